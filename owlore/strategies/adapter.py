"""Base of the methods that train an adapter inside a frozen model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from owlore.injection import InjectedAdapter, inject_adapter
from owlore.optim import UpdateSpec
from owlore.strategies.base import PrepareContext, Strategy


class AdapterStrategy(Strategy):
    """Everything is frozen but what `prepare` put into the model; nothing is sampled and nothing projected.

    A block counts as trained when a part of the adapter lies in it, so that backward stops at the lowest such block.
    """

    adapts = True
    accepted_options = frozenset()

    @classmethod
    def prepare(cls, model: nn.Module, start: PrepareContext) -> InjectedAdapter:
        return inject_adapter(model, cls.adapter_config(model, start), seed=start.seed)

    @classmethod
    def adapter_config(cls, model: nn.Module, start: PrepareContext) -> Any:
        """The PEFT configuration of the method's options."""
        raise NotImplementedError

    def blocks_at(self, period: int) -> tuple[int, ...]:
        del period
        holds = {block for name, block in self.parts.block_of().items() if name in self.config.trained}
        return tuple(sorted(holds))

    def specs_for(self, blocks: Iterable[int]) -> dict[str, UpdateSpec]:
        del blocks
        parameters = self.parts.parameters(range(self.parts.num_blocks), self.parts.groups)
        return {
            name: self.spec(p.ndim, projectable=False) for name, p in parameters.items() if name in self.config.trained
        }

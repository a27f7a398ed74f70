"""Base of the methods that train an adapter inside a frozen model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from owlore.attach import Attached, attach
from owlore.optim import Rule
from owlore.strategies.base import Start, Strategy


class AdapterStrategy(Strategy):
    """Everything is frozen but what `prepare` put into the model; nothing is sampled and nothing projected.

    A block counts as trained when a part of the adapter lies in it, so that backward stops at the lowest such block.
    """

    adapts = True
    reads = frozenset()

    @classmethod
    def prepare(cls, model: nn.Module, start: Start) -> Attached:
        return attach(model, cls.adapter_config(model, start), seed=start.seed)

    @classmethod
    def adapter_config(cls, model: nn.Module, start: Start) -> Any:
        """The PEFT configuration of the method's options."""
        raise NotImplementedError

    def blocks_at(self, period: int) -> tuple[int, ...]:
        del period
        holds = {block for name, block in self.units.block_of().items() if name in self.hyper.trained}
        return tuple(sorted(holds))

    def rules_for(self, blocks: Iterable[int]) -> dict[str, Rule]:
        del blocks
        parameters = self.units.parameters(range(self.units.num_blocks), self.units.groups)
        return {
            name: self.rule(p.ndim, projectable=False) for name, p in parameters.items() if name in self.hyper.trained
        }

"""Base of the methods that train an adapter inside a frozen model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from owlore.injection import InjectedAdapter, inject_adapter
from owlore.optim import UpdateSpec
from owlore.strategies.base import PrepareContext, Strategy


class AdapterStrategy(Strategy):
    """Only what `prepare` put into the model is trained; nothing is sampled and nothing projected.

    A block counts as trained when a part of the adapter lies in it, so that backward stops at the lowest such block.
    """

    adapts = True
    accepted_options = frozenset()

    @classmethod
    def prepare(cls, model: nn.Module, context: PrepareContext) -> InjectedAdapter:
        config = cls.adapter_config(model, context)
        pissa = getattr(config, "init_lora_weights", None) == "pissa"  # subtracts A and B from the base
        return inject_adapter(model, config, seed=context.seed, takes_from_base=pissa)

    @classmethod
    def adapter_config(cls, model: nn.Module, context: PrepareContext) -> Any:
        """The PEFT configuration of the method's options.

        Args:
            model: the model, frozen.
            context: what the method may use.
        """
        raise NotImplementedError

    def blocks_at(self, period: int) -> tuple[int, ...]:
        del period
        return tuple(sorted({b for name, b in self.parts.block_of().items() if name in self.config.trained}))

    def specs_for(self, blocks: Iterable[int]) -> dict[str, UpdateSpec]:
        del blocks
        parameters = self.parts.parameters(range(self.parts.num_blocks), self.parts.groups)
        return {
            name: self.spec(p.ndim, projectable=False) for name, p in parameters.items() if name in self.config.trained
        }

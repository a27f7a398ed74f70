"""The backend of a model whose blocks all lie on one device in their own format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from owlore.activations.checkpointing import ActivationCheckpointing
from owlore.blocks import ModelParts
from owlore.data.batches import MicroBatch
from owlore.optim import RotatingOptimizer, UpdateSpec
from owlore.training.backend import active_blocks, copy_into, trains_embeddings
from owlore.training.loss import CausalLoss
from owlore.training.step import backward_micro_batches


class ResidentBackend:
    """Plain forward and backward, with activation checkpointing of the blocks that backward reaches.

    Args:
        parts: the model's parts.
        optimizer: takes the gradients.
        loss: gives the summed loss of a micro-batch.
        device: where the model lies.
        recompute: activation checkpointing of the blocks; None for none.
    """

    exact = True  # nothing is quantised
    frozen: str | None = None

    def __init__(
        self,
        parts: ModelParts,
        optimizer: RotatingOptimizer,
        loss: CausalLoss,
        device: torch.device,
        recompute: ActivationCheckpointing | None = None,
    ) -> None:
        self.parts, self.optimizer, self.loss, self.device, self.recompute = parts, optimizer, loss, device, recompute
        self._parameters = parts.parameters(range(parts.num_blocks), parts.groups)

    def set_active(self, rules: Mapping[str, UpdateSpec]) -> None:
        """Checkpoint down to the lowest active block, or to the bottom where the embeddings are trained."""
        if self.recompute is not None:
            bottom = trains_embeddings(self.parts, rules)
            self.recompute.lowest = 0 if bottom else min(active_blocks(self.parts, rules), default=0)

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Do nothing: every block is on the device."""

    def gather(self, batches: Mapping[int, MicroBatch], tokens: int, *, seed: int, step: int) -> Tensor:
        """Give the optimizer the gradients of the micro-batches; return the share of each in the mean loss."""
        return backward_micro_batches(
            self.loss, self.optimizer, batches, tokens, seed=seed, step=step, device=self.device
        )

    def losses(self, batches: Iterable[MicroBatch], *, exact: bool) -> Iterator[Tensor]:
        """Summed loss of each micro-batch without gradients."""
        for batch in batches:
            with torch.no_grad():
                yield self.loss(batch.input_ids.to(self.device), batch.labels.to(self.device))

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Values of parameters by name; they share the parameters' memory."""
        return {name: self._parameters[name].data for name in names}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters to these values."""
        copy_into(self._parameters, weights)

    def record(self) -> dict[str, Any] | None:
        """None: run.json has no entry about residency."""
        return None

    def reassemble(self, device: torch.device) -> None:
        """Do nothing: the model was not taken apart."""

"""The protocol between the trainer and the model's storage, and what its two implementations share.

`ResidentBackend` has the whole model on one device; `StreamedBackend` streams or quantises frozen blocks. The trainer
does not ask which one it has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from owlore.blocks import ModelParts
from owlore.data.batches import MicroBatch
from owlore.optim import UpdateSpec


class Backend(Protocol):
    """Computes gradients and losses, and reads and writes parameters, wherever they are stored."""

    @property
    def exact(self) -> bool:
        """Whether frozen blocks are read with their own bits while others are trained."""

    @property
    def frozen(self) -> str | None:
        """Format of frozen blocks by its option name; None where the blocks lie on the device as they are."""

    def set_active(self, rules: Mapping[str, UpdateSpec]) -> None:
        """Prepare for training exactly the parameters that `rules` names."""

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Begin to read what the next period's blocks need."""

    def gather(self, batches: Mapping[int, MicroBatch], tokens: int, *, seed: int, step: int) -> Tensor:
        """Give the optimizer the gradients of a step's micro-batches.

        Args:
            batches: at least one, by their index in the step, from which each has its random numbers.
            tokens: trained tokens of the whole step, by which each loss is divided.
            seed: seed of the run.
            step: global step, from 0.

        Returns:
            The share of each micro-batch in the mean loss, fp32, on the device.
        """

    def losses(self, batches: Iterable[MicroBatch], *, exact: bool) -> Iterable[Tensor]:
        """Summed loss of each micro-batch without gradients.

        Args:
            batches: the micro-batches, one after another.
            exact: whether the weights are those that are exported, not those that are trained against.
        """

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Exact values of parameters by name."""

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters to these values."""

    def record(self) -> dict[str, Any] | None:
        """The entry `residency` of run.json; None for none."""

    def reassemble(self, device: torch.device) -> None:
        """Put a model that was taken apart together on `device`, after all patches were taken off."""


def active_blocks(parts: ModelParts, names: Collection[str]) -> set[int]:
    """Indexes of the blocks in which one of the named parameters lies."""
    block_of = parts.block_of()
    return {block_of[name] for name in names if name in block_of}


def trains_embeddings(parts: ModelParts, names: Collection[str]) -> bool:
    """Whether backward has to reach the input embeddings."""
    return any(name in names for name, _ in parts.groups["embeddings"])


@torch.no_grad()
def copy_into(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the parameters of the same names."""
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)

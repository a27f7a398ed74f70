"""Activation checkpointing of only those blocks that backward reaches, with one buffer for what is kept.

The hidden states between blocks are kept. Left where the forward allocated them, these tensors lie between its
temporary ones, and the C heap cannot return the holes: most of a checkpointed peak was fragmentation. So each is copied
into one buffer (blocks, batch, tokens, width), and all that the forward allocates is freed when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from owlore.patches import PatchStack


class ActivationCheckpointing:
    """Replaces the forward of every block; blocks from `lowest` up are recomputed in backward, the others run plainly.

    It is non-reentrant, so a trained block whose input needs no gradient works, and no gradient is forced into the
    embeddings (transformers' own checkpointing does that, so its backward goes through all blocks). A recomputation
    stops at the last tensor that backward needs: the last product of a frozen block, a quarter of a Llama block, is not
    computed again.

    Args:
        blocks: the blocks, from the lowest up.
        enabled: whether any forward is replaced.
        patches: the stack on which the forwards are replaced.

    Attributes:
        lowest: the lowest block that backward reaches.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, enabled: bool, patches: PatchStack | None = None) -> None:
        self.lowest = 0
        self._count = len(blocks)
        self._buffer: Tensor | None = None  # of the forward that is running
        self.patches = PatchStack() if patches is None else patches
        self.patches.add(self._release)
        for index, block in enumerate(blocks if enabled else ()):
            self.patches.replace_forward(block, self._wrapped(block.forward, index))

    def _wrapped(self, forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() or index < self.lowest:
                return forward(*args, **kwargs)
            if not args or not isinstance(args[0], Tensor):
                return checkpoint(forward, *args, use_reentrant=False, **kwargs)
            hidden, *rest = args
            boundary = _Boundary(hidden)
            kept = self._keep(hidden, index)
            out = checkpoint(_forward_from, boundary, forward, *rest, use_reentrant=False, **kwargs)
            boundary.hidden = kept
            return out

        return run

    @torch.no_grad()
    def _keep(self, hidden: Tensor, index: int) -> Tensor:
        """A copy of a block's input in the buffer of this forward.

        After the last block the buffer is referenced by the copies alone, and lives as long as backward needs them.
        """
        buffer, row = self._buffer, index - self.lowest
        if buffer is None or row == 0 or buffer.shape[1:] != hidden.shape or buffer.dtype != hidden.dtype:
            buffer = hidden.new_empty(self._count - self.lowest, *hidden.shape)
        self._buffer = buffer if index < self._count - 1 else None
        return buffer[row].copy_(hidden).requires_grad_(hidden.requires_grad)

    def _release(self) -> None:
        self._buffer = None


class _Boundary:
    """The input of a block: the forward's own hidden state, and for the recomputation its copy."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _forward_from(boundary: _Boundary, forward: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    return forward(boundary.hidden, *rest, **kwargs)

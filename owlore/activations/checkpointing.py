"""Activation checkpointing for just those blocks that backward reaches, with one buffer for what is kept.

Kept is the hidden state between two blocks. Left where the forward made them, these tensors lie between its passing
ones and the heap of a CPU cannot give the holes back: most of a checkpointed peak was fragmentation. So each is copied
into one buffer (blocks, batch, tokens, width), and what the forward allocates is gone when it ends.
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
    """Wraps the forward of every block; blocks from `lowest` up are recomputed in backward, the others run as they are.

    Non-reentrant, so a trained block whose input needs no gradient works, and nothing forces gradients into the
    embeddings (transformers' own switch does, which makes backward walk the whole stack). A recomputation stops at the
    last tensor that backward wants: of a frozen block the last product, a quarter of a Llama block, is not done again.
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
        """A copy of a block's input in the buffer of this forward; the last block's lets go of the buffer, which then
        lives as long as backward needs it."""
        buffer, row = self._buffer, index - self.lowest
        if buffer is None or row == 0 or buffer.shape[1:] != hidden.shape or buffer.dtype != hidden.dtype:
            buffer = hidden.new_empty(self._count - self.lowest, *hidden.shape)
        self._buffer = buffer if index < self._count - 1 else None
        return buffer[row].copy_(hidden).requires_grad_(hidden.requires_grad)

    def _release(self) -> None:
        self._buffer = None


class _Boundary:
    """What a block starts from: the forward's own hidden state while that runs, its copy when it is run again."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _forward_from(boundary: _Boundary, forward: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    return forward(boundary.hidden, *rest, **kwargs)

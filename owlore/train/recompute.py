"""Activation checkpointing for just those blocks that backward reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recompute:
    """Wraps the forward of every block; blocks from `lowest` up are recomputed in backward, the others run as they are.

    Non-reentrant, so a trained block whose input needs no gradient works, and nothing forces gradients into the
    embeddings (transformers' own switch does, which makes backward walk the whole stack).
    """

    def __init__(self, blocks: Sequence[nn.Module], *, enabled: bool) -> None:
        self.lowest = 0
        self._originals: list[tuple[nn.Module, Callable[..., Any]]] = []
        if not enabled:
            return
        for index, block in enumerate(blocks):
            self._originals.append((block, block.forward))
            block.forward = self._wrapped(block.forward, index)

    def _wrapped(self, forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and index >= self.lowest:
                return checkpoint(forward, *args, use_reentrant=False, **kwargs)
            return forward(*args, **kwargs)

        return run

    def remove(self) -> None:
        """Give the blocks their own forward back."""
        for block, _ in self._originals:
            del block.forward  # the wrapper hides the class's method on the instance only
        self._originals.clear()

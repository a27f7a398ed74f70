"""Free memory that the C heap keeps is given back while a step runs on the CPU.

torch asks glibc for aligned memory, and glibc (up to 2.37 at least) looks for 96 bytes more than it will hand out: a
hole that a tensor left is never taken by a tensor of the same size. Autograd's small nodes lie between the holes and
keep them from joining, so each block of a forward leaves its passing tensors behind as free memory that stays
resident: 8 MB a block of SmolLM2-135M at 4 x 256 tokens, more than half of a checkpointed peak. Mapping large tensors
one by one (M_MMAP_THRESHOLD) avoids it too, and costs a page fault for every 4 KiB of every one of them, a quarter of
the step. Giving back what is free once in a while costs next to nothing, as the holes would not be used again.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from owlore.patches import PatchStack

GROWTH = 128 << 20  # bytes of free memory that may stay resident

_STATM = Path("/proc/self/statm")


@cache
def _trimmer() -> Callable[[int], int] | None:
    """glibc's malloc_trim, None where the C library has none."""
    try:
        found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):
        return None
    return found if _STATM.exists() else None


@contextmanager
def trimmed_heap(blocks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """While this lasts, forward and backward through `blocks` on the CPU give free memory back whenever the resident
    set exceeds what was found to be needed at most by GROWTH; below that the heap keeps it, as pages that are given
    back cost a fault when the next step wants them. Without glibc, or on another device, nothing happens."""
    trim = _trimmer()
    if trim is None or device.type != "cpu":
        yield
        return
    trim(0)
    ceiling = _resident() + GROWTH

    def look(*_: Any) -> None:
        nonlocal ceiling
        if _resident() > ceiling:
            trim(0)
            ceiling = max(ceiling, _resident() + GROWTH)

    def look_now_and_in_backward(module: nn.Module, inputs: Any, output: Any) -> None:
        look()
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(look)

    with PatchStack() as patches:
        for block in blocks:
            patches.add(block.register_forward_hook(look_now_and_in_backward).remove)
        yield


def _resident() -> int:
    """Bytes of the resident set."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

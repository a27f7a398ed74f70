"""Returns free memory of the C heap to the system while a step runs on the CPU.

torch asks glibc for aligned memory, and glibc (up to 2.37 at least) searches for 96 bytes more than it will use: a hole
that a freed tensor left is never used for a tensor of the same size. Autograd's small nodes lie between the holes and
prevent their merging, so each block of a forward leaves its temporary tensors as free memory that stays resident: 8 MB
a block of SmolLM2-135M at 4 x 256 tokens, more than half of a checkpointed peak. Mapping large tensors one by one
(M_MMAP_THRESHOLD) avoids that too, and costs a page fault for every 4 KiB of each, a quarter of the step. `malloc_trim`
once in a while costs next to nothing, because the holes would not be used again.
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
    """While this lasts, forward and backward through `blocks` on the CPU return free memory when it has grown.

    The heap is trimmed when the resident set is GROWTH larger than it was at most after a trim; below that it keeps
    its free memory, because pages that are returned cost a fault when the next step needs them. Without glibc, or on
    another device, nothing happens.
    """
    trim = _trimmer()
    if trim is None or device.type != "cpu":
        yield
        return
    trim(0)
    ceiling = _resident() + GROWTH

    def trim_if_grown(*_: Any) -> None:
        nonlocal ceiling
        if _resident() > ceiling:
            trim(0)
            ceiling = max(ceiling, _resident() + GROWTH)

    def trim_now_and_in_backward(module: nn.Module, inputs: Any, output: Any) -> None:
        trim_if_grown()
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(trim_if_grown)

    with PatchStack() as patches:
        for block in blocks:
            patches.add(block.register_forward_hook(trim_now_and_in_backward).remove)
        yield


def _resident() -> int:
    """Bytes of the resident set."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

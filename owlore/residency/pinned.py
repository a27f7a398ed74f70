"""Page-locked host memory, from which copies run beside the compute.

torch's pinned allocator rounds a size up to a power of two (a block of 436 MB takes 537), so an exact buffer is
registered instead. Where locking is refused the memory stays pageable; copies then go through a few pinned buffers.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 4096  # bytes


@dataclass(frozen=True)
class HostBlob:
    """Host memory (uint8, flat) and whether it is page-locked."""

    tensor: Tensor
    pinned: bool


Pin = Callable[[int], HostBlob]  # a number of bytes -> host memory of that size


class Pages(mmap.mmap):
    """Anonymous pages that are unlocked before they are unmapped.

    The driver would otherwise take what is mapped at their address later for locked memory, and copies from there would
    fail or read pages that are gone.
    """

    address = 0  # where they are locked; 0 while they are not

    def __del__(self) -> None:
        if self.address:
            with contextlib.suppress(Exception):  # at the interpreter's end the driver may be gone first
                torch.cuda.cudart().cudaHostUnregister(self.address)


def pageable(num_bytes: int) -> HostBlob:
    """Host memory that is not locked, which a CPU does not need; on pages of its own, so that none is locked twice."""
    return HostBlob(_memory(_pages(num_bytes), num_bytes), False)


def pin(num_bytes: int) -> HostBlob:
    """Host memory that stays locked for its lifetime; not locked where the driver refuses."""
    pages = _pages(num_bytes)
    tensor = _memory(pages, num_bytes)
    if not torch.cuda.is_available():
        return HostBlob(tensor, False)
    status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), len(pages), 0)
    if int(status):
        _clear_cuda_error()
        return HostBlob(tensor, False)
    pages.address = tensor.data_ptr()
    return HostBlob(tensor, True)


def _pages(num_bytes: int) -> Pages:
    return Pages(-1, max(PAGE, locked_bytes(num_bytes)))


def _memory(pages: Pages, num_bytes: int) -> Tensor:
    return torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]


def _clear_cuda_error() -> None:
    """Clear the error of a refused registration, which CUDA would report at the next launch."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def locked_bytes(num_bytes: int) -> int:
    """Bytes that a registered buffer of this size locks: whole pages."""
    return -(-num_bytes // PAGE) * PAGE

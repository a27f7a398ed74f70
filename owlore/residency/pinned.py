"""Host memory that a device can read beside its compute: page-locked where the system allows it.

torch's own pinned allocator rounds a size up to a power of two (an 8B block of 436 MB takes 537), so an exact buffer
is registered instead. Where locking is refused the memory stays pageable; copies then go through a small pinned ring.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 4096


@dataclass(frozen=True)
class HostBlob:
    """Host memory (uint8, flat) and whether it is page-locked."""

    tensor: Tensor
    pinned: bool


Pin = Callable[[int], HostBlob]  # a number of bytes -> host memory of that size


class Pages(mmap.mmap):
    """Pages of their own, unlocked before they are given back: the driver would go on taking whatever is mapped at
    their address later for locked memory, and copies from there fail or read pages that are gone."""

    address = 0  # where they are locked

    def __del__(self) -> None:
        if self.address:
            with contextlib.suppress(Exception):  # at the interpreter's end the driver may be gone first
                torch.cuda.cudart().cudaHostUnregister(self.address)


def host_memory(num_bytes: int) -> Tensor:
    """Host memory (uint8, flat) on pages of its own, so that no page is asked to be locked twice."""
    return _memory(_pages(num_bytes), num_bytes)


def pin(num_bytes: int) -> HostBlob:
    """Host memory that stays locked for its lifetime; unpinned when the driver refuses."""
    pages = _pages(num_bytes)
    tensor = _memory(pages, num_bytes)
    if not torch.cuda.is_available():
        return HostBlob(tensor, False)
    status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), len(pages), 0)
    if int(status):
        _forget_error()
        return HostBlob(tensor, False)
    pages.address = tensor.data_ptr()
    return HostBlob(tensor, True)


def _pages(num_bytes: int) -> Pages:
    return Pages(-1, max(PAGE, locked_bytes(num_bytes)))


def _memory(pages: Pages, num_bytes: int) -> Tensor:
    return torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]


def _forget_error() -> None:
    """A refused registration stays behind as the last error, which the next launch would be blamed for."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        return


def unlocked(num_bytes: int) -> HostBlob:
    """Host memory as it is: on a CPU nothing has to be locked."""
    return HostBlob(host_memory(num_bytes), False)


def locked_bytes(num_bytes: int) -> int:
    """What a registered buffer locks: whole pages."""
    return -(-num_bytes // PAGE) * PAGE


def rounded_bytes(num_bytes: int) -> int:
    """What torch's caching pinned allocator would take for it: the next power of two."""
    return 1 << max(0, num_bytes - 1).bit_length()

"""Host memory that a device can read beside its compute: page-locked where the system allows it.

torch's own pinned allocator rounds a size up to a power of two (an 8B block of 436 MB takes 537), so an exact buffer
is registered instead. Where locking is refused the memory stays pageable; copies then go through a small pinned ring.
"""

from __future__ import annotations

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


Pin = Callable[[Tensor], HostBlob]


def host_memory(num_bytes: int) -> Tensor:
    """Host memory (uint8, flat) on pages of its own, so that no page is asked to be locked twice."""
    whole = max(PAGE, locked_bytes(num_bytes))
    return torch.frombuffer(mmap.mmap(-1, whole), dtype=torch.uint8)[:num_bytes]


def pin(tensor: Tensor) -> HostBlob:
    """Lock memory of `host_memory` where it lies, for its lifetime; unpinned when the driver refuses."""
    if not torch.cuda.is_available():
        return HostBlob(tensor, False)
    status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), locked_bytes(tensor.numel()), 0)
    if int(status):
        _forget_error()
    return HostBlob(tensor, int(status) == 0)


def _forget_error() -> None:
    """A refused registration stays behind as the last error, which the next launch would be blamed for."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        return


def unlocked(tensor: Tensor) -> HostBlob:
    """Host memory as it is: on a CPU nothing has to be locked."""
    return HostBlob(tensor, False)


def locked_bytes(num_bytes: int) -> int:
    """What a registered buffer locks: whole pages."""
    return -(-num_bytes // PAGE) * PAGE


def rounded_bytes(num_bytes: int) -> int:
    """What torch's caching pinned allocator would take for it: the next power of two."""
    return 1 << max(0, num_bytes - 1).bit_length()

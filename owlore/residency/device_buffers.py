"""A few permanent device buffers that streamed blocks take turns in.

A slot has an owner (the block whose bytes it holds or will hold), a event of its last copy, a event of the compute
that last read it, and a count of leases. Nobody reads a slot without a lease, and a leased slot is never refilled.
"""

from __future__ import annotations

from torch import Tensor

from owlore.residency.copy_queue import CopyEvent, CopyQueue
from owlore.residency.pinned import HostBlob

NUM_BUFFERS = 2  # one is read while the next one is filled


class DeviceBuffers:
    """`count` buffers of `num_bytes` each."""

    def __init__(self, copies: CopyQueue, count: int, num_bytes: int) -> None:
        self.copies = copies
        self.buffers = [copies.buffer(num_bytes) for _ in range(count)]
        self.owner: list[int | None] = [None] * count
        self.leases = [0] * count
        self._ready: list[CopyEvent] = [None] * count
        self._free: list[CopyEvent] = [None] * count

    @property
    def num_bytes(self) -> int:
        """Device bytes of all slots."""
        return sum(buffer.numel() for buffer in self.buffers)

    def load(self, slot: int, block: int, blob: HostBlob) -> None:
        """Queue the block's bytes into a slot that nobody reads."""
        if self.leases[slot]:
            raise RuntimeError(f"slot {slot} holds block {self.owner[slot]} under a lease and was to be refilled")
        self.owner[slot] = self.copies.about = block
        into = self.buffers[slot][: blob.tensor.numel()]
        self._ready[slot] = self.copies.load(into, blob, self._free[slot])

    def lease(self, block: int) -> tuple[int, Tensor]:
        """(slot, its buffer) of a block that was loaded; the compute waits for the copy, the host does not."""
        slot = self.owner.index(block)
        self.copies.about = block
        if self._ready[slot] is not None:
            self.copies.wait(self._ready[slot])
            self._ready[slot] = None
        if not self.leases[slot]:
            self.copies.leased(self.buffers[slot])
        self.leases[slot] += 1
        return slot, self.buffers[slot]

    def release(self, slot: int) -> None:
        """Give a lease back; what the compute was given until now may still read the slot, later copies wait for it."""
        self.leases[slot] -= 1
        if not self.leases[slot]:
            self._free[slot] = self.copies.mark()
            self.copies.released(self.buffers[slot])

    def forget(self, block: int) -> None:
        """The block's bytes in a slot, if they are in one, are no longer its weights."""
        self.owner = [None if owner == block else owner for owner in self.owner]

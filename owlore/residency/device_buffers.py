"""A few permanent device buffers that streamed blocks share.

Each buffer has the block whose bytes it holds or will hold, an event of its last copy, an event of the compute that
last read it, and a count of leases. A buffer is read under a lease only, and a leased buffer is never refilled.
"""

from __future__ import annotations

from torch import Tensor

from owlore.residency.copy_queue import CopyEvent, CopyQueue
from owlore.residency.pinned import HostBlob

NUM_BUFFERS = 2  # one is read while the next one is filled


class DeviceBuffers:
    """`count` buffers of `num_bytes` bytes each.

    Attributes:
        blocks: the block of each buffer, None for an empty one.
        leases: the number of leases on each buffer.
    """

    def __init__(self, copy_queue: CopyQueue, count: int, num_bytes: int) -> None:
        self.copy_queue = copy_queue
        self.buffers = [copy_queue.allocate(num_bytes) for _ in range(count)]
        self.blocks: list[int | None] = [None] * count
        self.leases = [0] * count
        self._copied: list[CopyEvent] = [None] * count
        self._last_read: list[CopyEvent] = [None] * count

    @property
    def num_bytes(self) -> int:
        """Device bytes of all buffers."""
        return sum(buffer.numel() for buffer in self.buffers)

    def load(self, index: int, block: int, blob: HostBlob) -> None:
        """Queue the copy of a block's blob into a buffer.

        Raises:
            RuntimeError: the buffer is under a lease.
        """
        if self.leases[index]:
            raise RuntimeError(f"buffer {index} holds block {self.blocks[index]} under a lease and was to be refilled")
        self.blocks[index] = self.copy_queue.current_block = block
        target = self.buffers[index][: blob.tensor.numel()]
        self._copied[index] = self.copy_queue.load(target, blob, self._last_read[index])

    def lease(self, block: int) -> tuple[int, Tensor]:
        """Lease the buffer of a block that was loaded; the compute waits for the copy, the host does not.

        Returns:
            The index of the buffer, for `release`, and the buffer.
        """
        index = self.blocks.index(block)
        self.copy_queue.current_block = block
        if self._copied[index] is not None:
            self.copy_queue.wait_event(self._copied[index])
            self._copied[index] = None
        self.leases[index] += 1
        return index, self.buffers[index]

    def release(self, index: int) -> None:
        """End a lease; compute that was queued until now may still read the buffer, so later copies wait for it."""
        self.leases[index] -= 1
        if not self.leases[index]:
            self._last_read[index] = self.copy_queue.record_event()

    def invalidate(self, block: int) -> None:
        """Forget the buffered bytes of a block, whose weights have changed."""
        self.blocks = [None if held == block else held for held in self.blocks]

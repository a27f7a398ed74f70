"""The hidden states between blocks, kept for backward: on the device, or copied to the host and back.

Backward reads them in a known order (blocks from the top, micro-batches from the first), so the next ones are fetched
while one is used. The last ones that were saved are needed first and never leave the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from owlore.residency.copy_queue import CopyEvent, CopyQueue
from owlore.residency.pinned import Pin

Key = tuple[int, int]  # (block, micro-batch)
MAX_IN_FLIGHT = 2  # boundaries that are copied at a time in each direction


@dataclass
class _Offloaded:
    host: Tensor
    like: Tensor  # shape and dtype, on the meta device
    event: CopyEvent


class Boundaries:
    """Hidden states by block and micro-batch: `save` in the forward, `pop` in backward, `clear` at the end of a step.

    Args:
        copy_queue: the queue of the device on which blocks compute.
        offload: whether boundaries are copied to host memory; else they stay on the device.
        pin: allocates host memory.
    """

    def __init__(self, copy_queue: CopyQueue, *, offload: bool, pin: Pin) -> None:
        self.copy_queue, self.offload, self._pin = copy_queue, offload, pin
        self._on_device: dict[Key, Tensor] = {}
        self._on_host: dict[Key, _Offloaded] = {}
        self._unloading: deque[Key] = deque()
        self._fetching: dict[Key, CopyEvent] = {}
        self._order: list[Key] = []
        self._host_buffers: dict[Key, Tensor] = {}  # one a key, for the whole run

    def plan(self, order: Sequence[Key]) -> None:
        """Set the order in which boundaries will be popped."""
        self._order = list(order)

    def save(self, key: Key, hidden: Tensor) -> None:
        """Keep a boundary, and with `offload` queue its copy to the host."""
        self._on_device[key] = hidden
        if not self.offload:
            return
        host = self._host_buffer(key, hidden)
        self.copy_queue.current_block = key[0]
        self._on_host[key] = _Offloaded(host, hidden.to("meta"), self.copy_queue.unload(host, hidden))
        self._unloading.append(key)
        if len(self._unloading) > MAX_IN_FLIGHT:
            oldest = self._unloading.popleft()
            self.copy_queue.wait_event(self._on_host[oldest].event)  # what is computed next may reuse the memory
            del self._on_device[oldest]

    def pop(self, key: Key) -> Tensor:
        """Return a boundary and drop it; the next ones in the planned order are fetched meanwhile."""
        self._order.remove(key)
        self._fetch(key)
        for later in self._order[:MAX_IN_FLIGHT]:
            self._fetch(later)
        self.copy_queue.current_block = key[0]
        offloaded = self._on_host.pop(key, None)
        if key in self._fetching:
            self.copy_queue.wait_event(self._fetching.pop(key))
        elif offloaded is not None:  # still on the device, but its copy to the host may still read the memory
            self._unloading.remove(key)
            self.copy_queue.wait_event(offloaded.event)
        return self._on_device.pop(key)

    def _fetch(self, key: Key) -> None:
        if key in self._on_device:
            return
        offloaded = self._on_host[key]
        target = torch.empty_like(offloaded.like, device=self.copy_queue.device)
        self.copy_queue.current_block = key[0]
        self._fetching[key] = self.copy_queue.fetch(target, offloaded.host)
        self._on_device[key] = target

    def _host_buffer(self, key: Key, hidden: Tensor) -> Tensor:
        size = hidden.numel() * hidden.element_size()
        buffer = self._host_buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._host_buffers[key] = self._pin(size).tensor
        return buffer[:size].view(hidden.dtype).view(hidden.shape)

    def host_bytes(self) -> int:
        """Bytes of the host buffers."""
        return sum(buffer.numel() for buffer in self._host_buffers.values())

    def device_bytes(self) -> int:
        """Bytes of the boundaries that are on the device now."""
        return sum(hidden.numel() * hidden.element_size() for hidden in self._on_device.values())

    def clear(self) -> None:
        """Drop everything that was saved: after an error something may be left, after a whole step nothing is."""
        for container in (self._on_device, self._on_host, self._unloading, self._fetching, self._order):
            container.clear()

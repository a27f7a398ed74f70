"""Memory that is not page-locked reaches the device through a small ring that is.

A thread of its own copies into the ring and sends from there; it alone ever waits for the device, and only until a ring
buffer that it wants to use again has been read.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from owlore.residency.pinned import Pin


class Sent(Protocol):
    """What tells that a copy out of the ring is done."""

    def synchronize(self) -> object: ...


class Staging:
    """`size` ring buffers, each as large as what went through it. begin: called first on the thread."""

    def __init__(self, size: int, *, pin: Pin, begin: Callable[[], None] = lambda: None) -> None:
        self._pin = pin
        self._ring: list[Tensor | None] = [None] * size
        self._busy: list[Sent | None] = [None] * size
        self._turn = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="owlore-staging", initializer=begin)

    def submit(self, source: Tensor, send: Callable[[Tensor], Sent]) -> Future[Sent]:
        """Stage `source` (uint8, flat) and give the staged copy to `send`; the result is what `send` returned."""
        return self._thread.submit(self._stage, source, send)

    def _stage(self, source: Tensor, send: Callable[[Tensor], Sent]) -> Sent:
        turn, self._turn = self._turn, (self._turn + 1) % len(self._ring)
        busy = self._busy[turn]
        if busy is not None:
            busy.synchronize()
        buffer = self._ring[turn]
        if buffer is None or buffer.numel() < source.numel():
            buffer = self._ring[turn] = self._pin(source.numel()).tensor
        staged = buffer[: source.numel()]
        staged.copy_(source)
        self._busy[turn] = sent = send(staged)
        return sent

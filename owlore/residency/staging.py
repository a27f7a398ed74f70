"""Copies of memory that is not page-locked, by way of a few buffers that are.

A thread of its own copies into the buffers in turn and sends from there. It waits for the device only where a buffer
that it wants to use again has not been read yet; the main thread never waits.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from owlore.residency.pinned import Pin


class SendEvent(Protocol):
    """The event of a copy out of a buffer; a CUDA event is one."""

    def synchronize(self) -> object:
        """Return when the copy is done."""


class Staging:
    """Pinned buffers that are used in turn, each as large as the largest tensor that went through it.

    Args:
        size: number of buffers.
        pin: allocates them.
        initializer: called first on the thread.
    """

    def __init__(self, size: int, *, pin: Pin, initializer: Callable[[], None] = lambda: None) -> None:
        self._pin = pin
        self._buffers: list[Tensor | None] = [None] * size
        self._sent: list[SendEvent | None] = [None] * size
        self._next = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="owlore-staging", initializer=initializer)

    def submit(self, source: Tensor, send: Callable[[Tensor], SendEvent]) -> Future[SendEvent]:
        """Copy `source` (uint8, flat) to a buffer and call `send` with that copy; the result is what `send` returns."""
        return self._thread.submit(self._stage, source, send)

    def _stage(self, source: Tensor, send: Callable[[Tensor], SendEvent]) -> SendEvent:
        index, self._next = self._next, (self._next + 1) % len(self._buffers)
        earlier = self._sent[index]
        if earlier is not None:
            earlier.synchronize()
        buffer = self._buffers[index]
        if buffer is None or buffer.numel() < source.numel():
            buffer = self._buffers[index] = self._pin(source.numel()).tensor
        staged = buffer[: source.numel()]
        staged.copy_(source)
        self._sent[index] = event = send(staged)
        return event

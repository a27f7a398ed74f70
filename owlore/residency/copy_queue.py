"""Copies between host and device that run beside the compute, and the events that order them.

`load`, `fetch` and `unload` queue a copy and return its event. `wait_event` makes the compute (never the host) wait for
an event; `record_event` gives an event of what the compute was given so far. On a CPU a copy is done when it returns.
A queue that is `timed` records when copies, waits and visits began and ended (`Span`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from owlore.residency.pinned import HostBlob, pin
from owlore.residency.staging import Staging

CopyEvent = Any  # of a queue: None on a CPU, a CUDA event or the future of one on a GPU
Timestamp = Any  # of a queue: seconds on a CPU, a CUDA event on a GPU


@dataclass(frozen=True, kw_only=True)
class Span:
    """A recorded stretch of time.

    Attributes:
        kind: `copy` (a block's weights), `fetch` and `unload` (a boundary), `stall` (the compute waits), or the name
            that the caller of `CopyQueue.span` gave.
        block: index of the block, None where it belongs to no block.
        start, end: seconds from the first recorded moment.
    """

    kind: str
    block: int | None
    start: float
    end: float


class CopyQueue(ABC):
    """The copies of one device.

    Attributes:
        current_block: the block that the next copies and waits are for; spans are labelled with it.
        loads, loaded_bytes: number and bytes of the blobs that were loaded.
    """

    def __init__(self, device: torch.device, *, timed: bool = False) -> None:
        self.device, self.timed = device, timed
        self.current_block: int | None = None
        self._recorded: list[tuple[str, int | None, Timestamp, Timestamp]] = []
        self.loads = 0
        self.loaded_bytes = 0

    def allocate(self, num_bytes: int) -> Tensor:
        """Device memory (uint8, flat)."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def load(self, target: Tensor, blob: HostBlob, after: CopyEvent) -> CopyEvent:
        """Queue the copy of a blob.

        Args:
            target: device memory (uint8, flat) as large as the blob.
            blob: a block's weights on the host.
            after: the event after which the copy may begin; None for at once.
        """
        self.loads += 1
        self.loaded_bytes += blob.tensor.numel()
        return self._load(target, blob, after)

    @abstractmethod
    def _load(self, target: Tensor, blob: HostBlob, after: CopyEvent) -> CopyEvent: ...

    @abstractmethod
    def fetch(self, target: Tensor, host: Tensor) -> CopyEvent:
        """Queue the copy of `host` to a fresh device tensor, behind what the compute has been given so far."""

    @abstractmethod
    def unload(self, host: Tensor, source: Tensor) -> CopyEvent:
        """Queue the copy of a device tensor to `host`, behind what the compute has been given so far."""

    @abstractmethod
    def wait_event(self, event: CopyEvent) -> None:
        """Let what the compute is given from now on begin after the event."""

    @abstractmethod
    def record_event(self) -> CopyEvent:
        """An event of everything that the compute has been given."""

    # -- time --------------------------------------------------------------------------------------------------------

    def _now(self) -> Timestamp:
        return perf_counter()

    def _seconds_between(self, start: Timestamp, end: Timestamp) -> float:
        return float(end - start)

    @contextmanager
    def span(self, kind: str, block: int | None = None) -> Iterator[None]:
        """Record the time of what the compute is given inside, if the queue is timed."""
        start = self._now() if self.timed else None
        yield
        if self.timed:
            self._recorded.append((kind, block, start, self._now()))

    def timeline(self) -> list[Span]:
        """The spans since the last call. On CUDA this waits for the device, so call it between steps."""
        recorded, self._recorded = self._recorded, []
        if not recorded:
            return []
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        first, between = recorded[0][2], self._seconds_between
        offsets = [(kind, block, between(first, start), between(first, end)) for kind, block, start, end in recorded]
        zero = min(start for _, _, start, _ in offsets)
        return [Span(kind=kind, block=block, start=start - zero, end=end - zero) for kind, block, start, end in offsets]

    def seconds(self) -> dict[str, float]:
        """Seconds since the last call: `copy` of copies to the device, `stall` in which the compute waited for them.

        Empty in a queue that is not timed.
        """
        if not self.timed:
            return {}
        kinds = {"copy": ("copy", "fetch"), "stall": ("stall",)}
        spans = self.timeline()
        return {name: sum(s.end - s.start for s in spans if s.kind in counted) for name, counted in kinds.items()}


class CpuCopyQueue(CopyQueue):
    """Device and host share one memory: a copy is done at once, and nothing is computed meanwhile."""

    def _load(self, target: Tensor, blob: HostBlob, after: CopyEvent) -> CopyEvent:
        self._copy("copy", target, blob.tensor)

    def fetch(self, target: Tensor, host: Tensor) -> CopyEvent:
        self._copy("fetch", target, host)

    def unload(self, host: Tensor, source: Tensor) -> CopyEvent:
        self._copy("unload", host, source)

    def _copy(self, kind: str, target: Tensor, source: Tensor) -> None:
        with self.span(kind, self.current_block):
            target.copy_(source)

    def wait_event(self, event: CopyEvent) -> None:
        return None

    def record_event(self) -> CopyEvent:
        return None


class CudaCopyQueue(CopyQueue):
    """Two copy streams beside the current one, one for each direction; events alone keep the order between them."""

    STAGING_BUFFERS = 3  # pinned buffers through which blobs that could not be pinned are copied

    def __init__(self, device: torch.device, *, timed: bool = False) -> None:
        super().__init__(device, timed=timed)
        self._to_device, self._to_host = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._staging: Staging | None = None

    def _load(self, target: Tensor, blob: HostBlob, after: CopyEvent) -> CopyEvent:
        copy = self._copy_on(self._to_device, "copy", target, after)
        if blob.pinned:
            return copy(blob.tensor)
        if self._staging is None:
            device = self._to_device.device  # with its index, which `set_device` in another thread needs
            self._staging = Staging(self.STAGING_BUFFERS, pin=pin, initializer=lambda: torch.cuda.set_device(device))
        return self._staging.submit(blob.tensor, copy)

    def fetch(self, target: Tensor, host: Tensor) -> CopyEvent:
        return self._copy_on(self._to_device, "fetch", target, self.record_event())(host)

    def unload(self, host: Tensor, source: Tensor) -> CopyEvent:
        return self._copy_on(self._to_host, "unload", host, self.record_event())(source)

    def _copy_on(
        self, stream: torch.cuda.Stream, kind: str, target: Tensor, after: CopyEvent
    ) -> Callable[[Tensor], torch.cuda.Event]:
        """A function that copies a tensor to `target` on `stream`; the staging thread may call it later."""
        block = self.current_block

        def copy(source: Tensor) -> torch.cuda.Event:
            if after is not None:
                stream.wait_event(after)
            began = self._event(stream) if self.timed else None
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            done = self._event(stream)
            if began is not None:
                self._recorded.append((kind, block, began, done))
            return done

        return copy

    def wait_event(self, event: CopyEvent) -> None:
        event = event.result() if isinstance(event, Future) else event
        with self.span("stall", self.current_block):
            torch.cuda.current_stream(self.device).wait_event(event)

    def record_event(self) -> CopyEvent:
        return self._event(torch.cuda.current_stream(self.device))

    def _now(self) -> Timestamp:
        return self.record_event()

    def _seconds_between(self, start: Timestamp, end: Timestamp) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=self.timed)
        event.record(stream)
        return event


def open_copy_queue(device: torch.device, *, timed: bool = False) -> CopyQueue:
    """The copy queue of a device."""
    return CudaCopyQueue(device, timed=timed) if device.type == "cuda" else CpuCopyQueue(device, timed=timed)

"""What streaming asks of a device: buffers, copies that run beside the compute, and tickets to order them.

`load` and `unload` are queued and done when their event is; `wait` makes the compute (never the host) wait for one,
`mark` is a event of what the compute has been given so far. On a CPU a copy is done when it returns. A copies that is
`timed` keeps the moments at which copies, waits and visits began and ended (`Span`).
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

CopyEvent = Any


@dataclass(frozen=True, kw_only=True)
class Span:
    """Something that took time. kind: copy (a block's weights), fetch and unload (a boundary), stall, or what the
    caller of `CopyQueue.span` names. block: None where it is of none. Seconds, from the first moment that was kept."""

    kind: str
    block: int | None
    start: float
    end: float


Moment = Any  # of a queue: seconds on a CPU, an event on CUDA


class CopyQueue(ABC):
    """One device and its queues of copies. Counts what was loaded.

    about: the block that the next copies and waits are for, which spans are labelled with.
    """

    def __init__(self, device: torch.device, *, timed: bool = False) -> None:
        self.device, self.timed = device, timed
        self.about: int | None = None
        self._kept: list[tuple[str, int | None, Moment, Moment]] = []
        self.loads = 0
        self.loaded_bytes = 0
        self.buffer_bytes = 0

    def buffer(self, num_bytes: int) -> Tensor:
        """Permanent device memory (uint8, flat)."""
        self.buffer_bytes += num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def load(self, into: Tensor, blob: HostBlob, after: CopyEvent) -> CopyEvent:
        """Queue blob -> into, to begin when `after` (None: at once) is done."""
        self.loads += 1
        self.loaded_bytes += blob.tensor.numel()
        return self._load(into, blob, after)

    @abstractmethod
    def _load(self, into: Tensor, blob: HostBlob, after: CopyEvent) -> CopyEvent: ...

    @abstractmethod
    def fetch(self, into: Tensor, host: Tensor) -> CopyEvent:
        """Queue host -> into for a fresh device tensor, behind what the compute has been given so far."""

    @abstractmethod
    def unload(self, into: Tensor, source: Tensor) -> CopyEvent:
        """Queue source -> into (host memory), behind what the compute has been given so far."""

    @abstractmethod
    def wait(self, event: CopyEvent) -> None:
        """What the compute is given from now on begins after the event."""

    @abstractmethod
    def mark(self) -> CopyEvent:
        """An event of everything that the compute has been given."""

    def leased(self, slot: Tensor) -> None:
        """A lease on a slot begins; for ports that check how slots are used."""
        del slot

    def released(self, slot: Tensor) -> None:
        """The last lease on a slot ended."""
        del slot

    # -- time --------------------------------------------------------------------------------------------------------

    def moment(self) -> Moment:
        """Now, in the queue of the compute."""
        return perf_counter()

    def between(self, start: Moment, end: Moment) -> float:
        """Seconds from one moment to another."""
        return float(end - start)

    @contextmanager
    def span(self, kind: str, block: int | None = None) -> Iterator[None]:
        """What the compute is given inside, in a queue that is timed."""
        start = self.moment() if self.timed else None
        yield
        if self.timed:
            self._kept.append((kind, block, start, self.moment()))

    def timeline(self) -> list[Span]:
        """What was kept since the last call; on CUDA this waits for the device, so not inside a step."""
        kept, self._kept = self._kept, []
        if not kept:
            return []
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        first = kept[0][2]
        offsets = [(kind, block, self.between(first, a), self.between(first, b)) for kind, block, a, b in kept]
        zero = min(start for _, _, start, _ in offsets)
        return [Span(kind=kind, block=block, start=a - zero, end=b - zero) for kind, block, a, b in offsets]

    def seconds(self) -> dict[str, float]:
        """Seconds that copies to the device took and that the compute stood still for them since the last call; empty
        in a queue that is not timed."""
        if not self.timed:
            return {}
        kinds = {"copy": ("copy", "fetch"), "stall": ("stall",)}
        spans = self.timeline()
        return {name: sum(s.end - s.start for s in spans if s.kind in counted) for name, counted in kinds.items()}


class CpuCopyQueue(CopyQueue):
    """Device and host are one memory: a copy is done when it is asked for, and the compute stands still meanwhile."""

    def _load(self, into: Tensor, blob: HostBlob, after: CopyEvent) -> CopyEvent:
        self._copy("copy", into, blob.tensor)

    def fetch(self, into: Tensor, host: Tensor) -> CopyEvent:
        self._copy("fetch", into, host)

    def unload(self, into: Tensor, source: Tensor) -> CopyEvent:
        self._copy("unload", into, source)

    def _copy(self, kind: str, into: Tensor, source: Tensor) -> None:
        with self.span(kind, self.about):
            into.copy_(source)

    def wait(self, event: CopyEvent) -> None:
        return None

    def mark(self) -> CopyEvent:
        return None


class CudaCopyQueue(CopyQueue):
    """Two copy streams beside the current one, one a direction; the order between them is kept by events alone."""

    RING = 3  # pinned buffers through which blobs that could not be pinned travel

    def __init__(self, device: torch.device, *, timed: bool = False) -> None:
        super().__init__(device, timed=timed)
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._staging: Staging | None = None

    def _load(self, into: Tensor, blob: HostBlob, after: CopyEvent) -> CopyEvent:
        copy = self._copier(self._in, "copy", into, after)
        if blob.pinned:
            return copy(blob.tensor)
        if self._staging is None:
            device = self._in.device  # with its number, without which no thread can make it its own
            self._staging = Staging(self.RING, pin=pin, begin=lambda: torch.cuda.set_device(device))
        return self._staging.submit(blob.tensor, copy)

    def fetch(self, into: Tensor, host: Tensor) -> CopyEvent:
        return self._copier(self._in, "fetch", into, self.mark())(host)

    def unload(self, into: Tensor, source: Tensor) -> CopyEvent:
        return self._copier(self._out, "unload", into, self.mark())(source)

    def _copier(
        self, stream: torch.cuda.Stream, kind: str, into: Tensor, after: CopyEvent
    ) -> Callable[[Tensor], torch.cuda.Event]:
        """Copies what it is given on `stream`, after an event; perhaps later and on another thread."""
        block = self.about

        def copy(source: Tensor) -> torch.cuda.Event:
            if after is not None:
                stream.wait_event(after)
            began = self._event(stream) if self.timed else None
            with torch.cuda.stream(stream):
                into.copy_(source, non_blocking=True)
            done = self._event(stream)
            if began is not None:
                self._kept.append((kind, block, began, done))
            return done

        return copy

    def wait(self, event: CopyEvent) -> None:
        event = event.result() if isinstance(event, Future) else event
        with self.span("stall", self.about):
            torch.cuda.current_stream(self.device).wait_event(event)

    def mark(self) -> CopyEvent:
        return self._event(torch.cuda.current_stream(self.device))

    def moment(self) -> Moment:
        return self.mark()

    def between(self, start: Moment, end: Moment) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=self.timed)
        event.record(stream)
        return event


def open_copy_queue(device: torch.device, *, timed: bool = False) -> CopyQueue:
    """The copy queue of a device."""
    return CudaCopyQueue(device, timed=timed) if device.type == "cuda" else CpuCopyQueue(device, timed=timed)

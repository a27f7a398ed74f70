"""What streaming asks of a device: buffers, copies that run beside the compute, and tickets to order them.

`load` and `unload` are queued and done when their ticket is; `wait` makes the compute (never the host) wait for one,
`mark` is a ticket of what the compute has been given so far. On a CPU a copy is done when it returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from owlore.residency.pinned import HostBlob, pin
from owlore.residency.staging import Staging

Ticket = Any


class Port(ABC):
    """One device and its queues of copies. Counts what was loaded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.loads = 0
        self.loaded_bytes = 0
        self.buffer_bytes = 0

    def buffer(self, num_bytes: int) -> Tensor:
        """Permanent device memory (uint8, flat)."""
        self.buffer_bytes += num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def load(self, into: Tensor, blob: HostBlob, after: Ticket) -> Ticket:
        """Queue blob -> into, to begin when `after` (None: at once) is done."""
        self.loads += 1
        self.loaded_bytes += blob.tensor.numel()
        return self._load(into, blob, after)

    @abstractmethod
    def _load(self, into: Tensor, blob: HostBlob, after: Ticket) -> Ticket: ...

    @abstractmethod
    def fetch(self, into: Tensor, host: Tensor) -> Ticket:
        """Queue host -> into for a fresh device tensor, behind what the compute has been given so far."""

    @abstractmethod
    def unload(self, into: Tensor, source: Tensor) -> Ticket:
        """Queue source -> into (host memory), behind what the compute has been given so far."""

    @abstractmethod
    def wait(self, ticket: Ticket) -> None:
        """What the compute is given from now on begins after the ticket."""

    @abstractmethod
    def mark(self) -> Ticket:
        """A ticket of everything that the compute has been given."""

    def leased(self, slot: Tensor) -> None:
        """A lease on a slot begins; for ports that check how slots are used."""
        del slot

    def released(self, slot: Tensor) -> None:
        """The last lease on a slot ended."""
        del slot

    def seconds(self) -> dict[str, float]:
        """Seconds that copies took and that the compute stood still for them, where the device can tell."""
        return {}


class CpuPort(Port):
    """Device and host are one memory: a copy is done when it is asked for."""

    def _load(self, into: Tensor, blob: HostBlob, after: Ticket) -> Ticket:
        into.copy_(blob.tensor)

    def fetch(self, into: Tensor, host: Tensor) -> Ticket:
        into.copy_(host)

    def unload(self, into: Tensor, source: Tensor) -> Ticket:
        into.copy_(source)

    def wait(self, ticket: Ticket) -> None:
        return None

    def mark(self) -> Ticket:
        return None


class CudaPort(Port):
    """Two copy streams beside the current one, one a direction; the order between them is kept by events alone.

    timed: record events around copies and waits; `seconds` then reads them (that synchronises, so not inside a step).
    """

    RING = 3  # pinned buffers through which blobs that could not be pinned travel

    def __init__(self, device: torch.device, *, timed: bool = False) -> None:
        super().__init__(device)
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._timed = timed
        self._spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {"copy": [], "stall": []}
        self._staging: Staging | None = None

    def _load(self, into: Tensor, blob: HostBlob, after: Ticket) -> Ticket:
        if blob.pinned:
            return self._copy_in(into, blob.tensor, after)
        if self._staging is None:
            self._staging = Staging(self.RING, pin=pin, begin=lambda: torch.cuda.set_device(self.device))
        return self._staging.submit(blob.tensor, lambda staged: self._copy_in(into, staged, after))

    def _copy_in(self, into: Tensor, source: Tensor, after: Ticket) -> torch.cuda.Event:
        if after is not None:
            self._in.wait_event(after)
        with torch.cuda.stream(self._in):
            began = self._event(self._in) if self._timed else None
            into.copy_(source, non_blocking=True)
        done = self._event(self._in)
        if began is not None:
            self._spans["copy"].append((began, done))
        return done

    def fetch(self, into: Tensor, host: Tensor) -> Ticket:
        return self._copy_in(into, host, self.mark())

    def unload(self, into: Tensor, source: Tensor) -> Ticket:
        self._out.wait_event(self.mark())
        with torch.cuda.stream(self._out):
            into.copy_(source, non_blocking=True)
        return self._event(self._out)

    def wait(self, ticket: Ticket) -> None:
        event = ticket.result() if isinstance(ticket, Future) else ticket
        compute = torch.cuda.current_stream(self.device)
        began = self._event(compute) if self._timed else None
        compute.wait_event(event)
        if began is not None:
            self._spans["stall"].append((began, self._event(compute)))

    def mark(self) -> Ticket:
        return self._event(torch.cuda.current_stream(self.device))

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=self._timed)
        event.record(stream)
        return event

    def seconds(self) -> dict[str, float]:
        if not self._timed:
            return {}
        torch.cuda.synchronize(self.device)
        found = {name: sum(a.elapsed_time(b) for a, b in spans) / 1e3 for name, spans in self._spans.items()}
        for spans in self._spans.values():
            spans.clear()
        return found


def open_port(device: torch.device, *, timed: bool = False) -> Port:
    """The port of a device."""
    return CudaPort(device, timed=timed) if device.type == "cuda" else CpuPort(device)

"""The hidden states between blocks, kept for backward: on the device, or on the host and back behind the compute.

Backward reads them in a known order (blocks downwards, micro-batches upwards), so the next ones are fetched while one
is used, and the last ones that were kept never leave the device.
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
AHEAD = 2  # boundaries in flight in each direction


@dataclass
class _Away:
    host: Tensor
    like: Tensor  # shape and dtype, on the meta device
    event: CopyEvent


class Boundaries:
    """`keep` in forward order, `take` in backward order, `clear` at the end of a step."""

    def __init__(self, copies: CopyQueue, *, offload: bool, pin: Pin) -> None:
        self.copies, self.offload, self._pin = copies, offload, pin
        self._here: dict[Key, Tensor] = {}
        self._away: dict[Key, _Away] = {}
        self._leaving: deque[Key] = deque()
        self._coming: dict[Key, CopyEvent] = {}
        self._order: list[Key] = []
        self._hosts: dict[Key, Tensor] = {}  # one a key, for the whole run

    def expect(self, order: Sequence[Key]) -> None:
        """The order in which boundaries will be taken."""
        self._order = list(order)

    def keep(self, key: Key, hidden: Tensor) -> None:
        self._here[key] = hidden
        if not self.offload:
            return
        host = self._host(key, hidden)
        self.copies.about = key[0]
        self._away[key] = _Away(host, hidden.to("meta"), self.copies.unload(host, hidden))
        self._leaving.append(key)
        if len(self._leaving) > AHEAD:
            gone = self._leaving.popleft()
            self.copies.wait(self._away[gone].event)  # what is computed next may reuse the memory
            del self._here[gone]

    def take(self, key: Key) -> Tensor:
        """The boundary, for the last time."""
        self._order.remove(key)
        self._fetch(key)
        for later in self._order[:AHEAD]:
            self._fetch(later)
        self.copies.about = key[0]
        away = self._away.pop(key, None)
        if key in self._coming:
            self.copies.wait(self._coming.pop(key))
        elif away is not None:  # it never left, but its copy may still be read from it when the caller lets go
            self._leaving.remove(key)
            self.copies.wait(away.event)
        return self._here.pop(key)

    def _fetch(self, key: Key) -> None:
        if key in self._here:
            return
        away = self._away[key]
        into = torch.empty_like(away.like, device=self.copies.device)
        self.copies.about = key[0]
        self._coming[key] = self.copies.fetch(into, away.host)
        self._here[key] = into

    def _host(self, key: Key, hidden: Tensor) -> Tensor:
        size = hidden.numel() * hidden.element_size()
        buffer = self._hosts.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._hosts[key] = self._pin(size).tensor
        return buffer[:size].view(hidden.dtype).view(hidden.shape)

    def host_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._hosts.values())

    def device_bytes(self) -> int:
        """Bytes of the boundaries that lie on the device now."""
        return sum(hidden.numel() * hidden.element_size() for hidden in self._here.values())

    def clear(self) -> None:
        """Forget what was kept; needed after an error, nothing is left after a whole step."""
        for held in (self._here, self._away, self._leaving, self._coming, self._order):
            held.clear()

"""A device for the tests of streaming: copies land when somebody waits, and poison is where nobody may read.

eager: a copy lands when it is queued. late: when its event is waited for. random: also at any call in between, in
queue order of its direction. A slot is all ones (NaN in every float format) from the moment that a copy into it is
queued, and whenever nobody holds a lease on it; a lease that finds the owner's bytes still valid gets them back.
"""

import random

import torch

from owlore.residency.copy_queue import CopyQueue

POISON = 0xFF


class FakeCopyQueue(CopyQueue):
    def __init__(self, landing="late", *, seed=0):
        super().__init__(torch.device("cpu"))
        assert landing in ("eager", "late", "random")
        self.landing, self.random = landing, random.Random(seed)
        self.queues = {
            "in": [],
            "out": [],
        }  # (event, into, source), oldest first; the directions know nothing of each other
        self.now = 0  # tickets given
        self.kept = {}  # slot address -> bytes of a slot that was released
        self.read_until = {}  # slot address -> event after which it may be overwritten
        self.leases_seen = 0
        self.unloaded_bytes = 0

    # -- queues ------------------------------------------------------------------------------------------------------

    def _queue(self, direction, into, source):
        self.now += 1
        event = (direction, self.now)
        self.queues[direction].append((event, into, source))
        if self.landing == "eager":
            self._land(event)
        elif self.landing == "random":
            for queue in self.queues.values():
                for _ in range(self.random.randrange(len(queue) + 1)):
                    self._land(queue[0][0])
        return event

    def _land(self, event):
        direction, number = event
        queue = self.queues[direction]
        while queue and queue[0][0][1] <= number:
            _, into, source = queue.pop(0)
            into.copy_(source)

    def _load(self, into, blob, after):
        address = into.data_ptr()
        if address in self.read_until:
            assert after is not None and after >= self.read_until[address], "a copy that does not wait for the readers"
        self.kept.pop(address, None)
        into.fill_(POISON)
        return self._queue("in", into, blob.tensor)

    def fetch(self, into, host):
        into.view(-1).view(torch.uint8).fill_(POISON)
        return self._queue("in", into, host)

    def unload(self, into, source):
        self.unloaded_bytes += source.numel() * source.element_size()
        into.view(-1).view(torch.uint8).fill_(POISON)
        return self._queue("out", into, source)

    def wait(self, event):
        assert event is not None
        self._land(event)

    def mark(self):
        self.now += 1
        return self.now

    # -- slots -------------------------------------------------------------------------------------------------------

    def leased(self, slot):
        self.leases_seen += 1
        kept = self.kept.pop(slot.data_ptr(), None)
        if kept is not None:
            slot.copy_(kept)

    def released(self, slot):
        self.kept[slot.data_ptr()] = slot.clone()
        self.read_until[slot.data_ptr()] = self.now
        slot.fill_(POISON)

"""A device for the tests of streaming: copies land late, and memory that must not be read is NaN.

landing: `eager` copies land when they are queued, `late` ones when their event is waited for, `random` ones also at any
call in between, in the order of their direction. A buffer is all ones (NaN in every float format) from the moment that
a copy into it is queued, and whenever there is no lease on it; a lease on a buffer that still holds its block gets the
bytes back.
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
        # (event, target, source), oldest first; the directions are independent of each other
        self.queues = {"in": [], "out": []}
        self.now = 0  # events given
        self.kept = {}  # buffer address -> bytes of a buffer that was released
        self.read_until = {}  # buffer address -> event after which it may be overwritten
        self.leases_seen = 0
        self.unloaded_bytes = 0

    # -- queues ------------------------------------------------------------------------------------------------------

    def _queue(self, direction, target, source):
        self.now += 1
        event = (direction, self.now)
        self.queues[direction].append((event, target, source))
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
            _, target, source = queue.pop(0)
            target.copy_(source)

    def _load(self, target, blob, after):
        address = target.data_ptr()
        if address in self.read_until:
            assert after is not None and after >= self.read_until[address], "a copy that does not wait for the readers"
        self.kept.pop(address, None)
        target.fill_(POISON)
        return self._queue("in", target, blob.tensor)

    def fetch(self, target, host):
        target.view(-1).view(torch.uint8).fill_(POISON)
        return self._queue("in", target, host)

    def unload(self, host, source):
        self.unloaded_bytes += source.numel() * source.element_size()
        host.view(-1).view(torch.uint8).fill_(POISON)
        return self._queue("out", host, source)

    def wait_event(self, event):
        assert event is not None
        self._land(event)

    def record_event(self):
        self.now += 1
        return self.now

    # -- leases ------------------------------------------------------------------------------------------------------

    def watch(self, device_buffers):
        """Poison each of the buffers whenever there is no lease on it."""
        lease, release = device_buffers.lease, device_buffers.release

        def watched_lease(block):
            index, buffer = lease(block)
            if device_buffers.leases[index] == 1:
                self.leases_seen += 1
                kept = self.kept.pop(buffer.data_ptr(), None)
                if kept is not None:
                    buffer.copy_(kept)
            return index, buffer

        def watched_release(index):
            release(index)
            buffer = device_buffers.buffers[index]
            if not device_buffers.leases[index]:
                self.kept[buffer.data_ptr()] = buffer.clone()
                self.read_until[buffer.data_ptr()] = self.now
                buffer.fill_(POISON)

        device_buffers.lease, device_buffers.release = watched_lease, watched_release

"""Device buffers: what a copy into a buffer waits for, and which buffers may be refilled."""

import pytest
import torch

from owlore.residency.copy_queue import CpuCopyQueue
from owlore.residency.device_buffers import DeviceBuffers
from owlore.residency.pinned import pageable


class NumberedEvents(CpuCopyQueue):
    """Events are numbers, and the events that copies wait for are recorded."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.events, self.waited_for = 0, []

    def record_event(self):
        self.events += 1
        return self.events

    def load(self, target, blob, after):
        self.waited_for.append(after)
        super().load(target, blob, after)


def buffers(count=1):
    queue = NumberedEvents()
    return queue, DeviceBuffers(queue, count, 64), pageable(64)


def test_a_copy_waits_for_the_compute_that_was_queued_before_the_last_lease_ended():
    queue, device_buffers, blob = buffers()
    device_buffers.load(0, 7, blob)
    assert queue.waited_for == [None]  # the buffer was never read
    index, _ = device_buffers.lease(7)
    device_buffers.lease(7)
    device_buffers.release(index)
    assert queue.events == 0  # the other lease goes on
    device_buffers.release(index)
    assert queue.events == 1
    device_buffers.load(0, 8, blob)
    assert queue.waited_for == [None, 1]


def test_a_leased_buffer_is_not_refilled_and_an_invalid_block_is_not_leased():
    _, device_buffers, blob = buffers(2)
    device_buffers.load(1, 7, blob)
    index, _ = device_buffers.lease(7)
    with pytest.raises(RuntimeError, match="buffer 1 holds block 7 under a lease"):
        device_buffers.load(1, 8, blob)
    device_buffers.release(index)
    device_buffers.invalidate(7)
    assert device_buffers.blocks == [None, None]
    with pytest.raises(ValueError, match="7 is not in list"):
        device_buffers.lease(7)

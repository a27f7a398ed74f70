"""How fast a CUDA device copies and multiplies: two figures that a plan needs, measured in under a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from owlore.models.loading import pick_device
from owlore.plan.traffic import Rates
from owlore.residency.pinned import pin

COPY_BYTES = 1 << 28
SIZE = 4096  # of the square bf16 matrices
STEP_SHARE = 0.5  # of a plain product's rate that a step reaches: 0.48 with 7B in one piece on an H100, 0.34 streamed


def measured_rates(device: torch.device) -> Rates | None:
    """Measure the bandwidth from locked host memory, and a step's speed as a share of a bf16 product's.

    Args:
        device: the device to measure.

    Returns:
        Both rates; None for a CPU.
    """
    if device.type != "cuda":
        return None
    host = pin(COPY_BYTES).tensor
    into = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    a, b = (torch.randn(SIZE, SIZE, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    bus = COPY_BYTES / _seconds(lambda: into.copy_(host, non_blocking=True), 4, device)
    product = 2 * SIZE**3 / _seconds(lambda: torch.mm(a, b, out=out), 20, device)
    return Rates(bus=bus, flops=STEP_SHARE * product, measured=True)


def rates_for(device: str, *, bus: float | None, tflops: float | None) -> Rates:
    """Find bandwidth and speed: as given, else measured on a CUDA device that is present, else assumed.

    Args:
        device: where the run would train, `auto`, `cpu` or `cuda[:N]`.
        bus: bandwidth from the host to the device in GB/s, where given.
        tflops: speed of the trainer's matrix products in TFLOP/s, where given.
    """
    if bus is not None and tflops is not None:
        return Rates(bus=bus * 1e9, flops=tflops * 1e12)
    found = measured_rates(pick_device(device)) or Rates()
    if bus is not None:
        found = replace(found, bus=bus * 1e9, measured=False)
    return found if tflops is None else replace(found, flops=tflops * 1e12, measured=False)


def _seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds of one call of `work`, over `times` calls after a first one."""
    work()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        work()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3 / times

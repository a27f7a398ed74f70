"""Seconds that a step's compute and copies take, from shapes alone.

Floating-point operations of the blocks and the head (attention scores are not counted) are divided by an assumed or
measured rate, bytes by an assumed or measured bandwidth. A copy is hidden behind the visit before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from owlore.plan.streamed import StreamedModel
from owlore.residency.device_buffers import NUM_BUFFERS
from owlore.residency.visits import loads_of_step

DRAWS_FOR_LOADS = 50


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a device copies and multiplies.

    Attributes:
        bus: bytes a second from the host to the device.
        flops: floating-point operations a second of the trainer's matrix products.
        measured: whether both were measured on the device at hand.
    """

    bus: float = 25e9
    flops: float = 165e12
    measured: bool = False


_cached_loads = lru_cache(maxsize=1024)(loads_of_step)  # many draws of a sampler have the same loads


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Compute and copies of one step, averaged over draws.

    Attributes:
        tokens: tokens of a step.
        loads: blocks that are copied to the device.
        bytes: bytes of these copies.
        copy_seconds: seconds of these copies.
        compute_seconds: seconds of the compute.
        stall_seconds: seconds in which the compute waits for a copy.
        hidden: whether a forward visit covers a copy.
        hidden_from: tokens a step from which it does.
        bus_gb_s: assumed or measured bandwidth, GB/s.
        tflops: assumed or measured rate, TFLOP/s.
        measured: whether both were measured.
    """

    tokens: int
    loads: float
    bytes: float
    copy_seconds: float
    compute_seconds: float
    stall_seconds: float
    hidden: bool
    hidden_from: int
    bus_gb_s: float
    tflops: float
    measured: bool

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return self.compute_seconds + self.stall_seconds

    def to_dict(self) -> dict[str, Any]:
        """Fields and `step_seconds`, as JSON."""
        return asdict(self) | {"step_seconds": self.step_seconds}


def traffic(
    model: StreamedModel,
    draws: Sequence[tuple[int, ...]],
    trained: Sequence[int],
    *,
    tokens: int,
    bottom: bool,
    rates: Rates,
    recompute: bool,
) -> Traffic:
    """Predict copies and compute of a step.

    Args:
        model: layouts of the blocks under the run's placement.
        draws: drawn blocks of some periods, over which the figures are averaged.
        trained: for each block the parameters that are trained when it is drawn.
        tokens: tokens of a step, over all micro-batches.
        bottom: whether backward reaches the embeddings.
        rates: bandwidth and rate of the device.
        recompute: whether blocks are computed again in backward.
    """
    parts = model.parts
    sizes = [sum(p.numel() for _, p in block) for block in parts.blocks]
    head = sum(p.numel() for _, p in parts.groups["head"])
    blob = max((model.layouts[block].num_bytes for block in model.streamed), default=0)
    copy, size = blob / rates.bus, max(sizes)
    forward = 2 * size * tokens / rates.flops
    loads, stalls, flops = [], [], []
    for draw in draws[:DRAWS_FOR_LOADS]:
        low = 0 if bottom else min(draw, default=parts.num_blocks)
        counted = _cached_loads(parts.num_blocks, low, frozenset(model.streamed - set(draw)), NUM_BUFFERS)
        loads.append(sum(counted))
        stalls.append(counted.forward * max(0.0, copy - forward) + counted.backward * max(0.0, copy - 2 * forward))
        again = 2 if recompute else 0
        down = sum((again + 2) * sizes[block] for block in range(low, parts.num_blocks))
        down += 2 * sum(trained[block] for block in draw)
        flops.append((2 * sum(sizes) + down + 4 * head) * tokens)
    return Traffic(
        tokens=tokens,
        loads=float(np.mean(loads)),
        bytes=float(np.mean(loads)) * blob,
        copy_seconds=float(np.mean(loads)) * copy,
        compute_seconds=float(np.mean(flops)) / rates.flops,
        stall_seconds=float(np.mean(stalls)),
        hidden=copy <= forward,
        hidden_from=int(np.ceil(blob * rates.flops / (2 * size * rates.bus))),
        bus_gb_s=rates.bus / 1e9,
        tflops=rates.flops / 1e12,
        measured=rates.measured,
    )

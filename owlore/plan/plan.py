"""`owlore plan`: bytes by kind before anything is trained, from the configuration of the model alone.

Weights, masters, gradients and optimizer state follow from shapes and are exact. Activations are counted on two blocks
(`footprint`) and scaled to the batch. All figures are for the worst draw that the table allows, which is what has to
fit; `expected` depth is the mean over draws. Each kind is given at its own peak; they do not all peak at one moment
(the logits are gone when backward reaches the blocks), so `total`, the peak of the whole, can be less than their sum.
What the process itself needs (the interpreter, a CUDA context) comes on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import nn

from htsr.errors import UsageError
from owlore.blocks import ModelParts
from owlore.optim import MasterPolicy, UpdateSpec
from owlore.optim.update_spec import HeldBytes, planned_state_bytes
from owlore.plan.advice import Advice
from owlore.plan.model_spec import ModelSpec, weight_bytes
from owlore.plan.resident import logits_bytes, resident_peak
from owlore.plan.streamed import MicroBatchBytes, PeakBytes, StreamedModel, streamed_peak
from owlore.plan.traffic import Rates, Traffic, traffic
from owlore.residency.placement import Placement
from owlore.sampling import DRAWS
from owlore.strategies import Strategy, StrategyConfig

DRAWS_FOR_DEPTH = 2000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes by kind, shares of parameters in [0, 1], depth in blocks."""

    bytes: dict[str, int]
    trainable: dict[str, float]
    backward_depth: dict[str, float]
    compute: dict[str, float]  # multiplications of a step as a share of full fine-tuning's, on average over draws
    traffic: Traffic
    host: dict[str, int] | None = None  # bytes in host memory by kind, where blocks are streamed or quantised
    advice: tuple[Advice, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "bytes": self.bytes,
            "trainable": self.trainable,
            "backward_depth": self.backward_depth,
            "compute": self.compute,
            "step": self.traffic.to_dict(),
            **({} if self.host is None else {"host": self.host}),
            "advice": [vars(piece) for piece in self.advice],
        }


def make_plan(
    shape: ModelSpec,
    strategy_class: type[Strategy],
    hyper: StrategyConfig,
    *,
    policy: MasterPolicy,
    batch: int,
    accum: int,
    tokens: int,
    recompute: bool,
    placement: Placement = Placement(),  # noqa: B008 - frozen
    rates: Rates = Rates(),  # noqa: B008
    processes: int = 1,
) -> Plan:
    """Bytes of a run with `batch` sequences of `tokens` tokens a micro-batch, in each of its processes.

    A process holds what a single one does, and gathers as with accumulation: a new basis waits for the gradients of
    all. Raises: UsageError for blocks that stream in several.
    """
    if processes > 1 and placement.streams:
        raise UsageError(f"got {processes} processes and streamed blocks, expected one process; leave --processes out")
    together = max(accum, min(processes, 2))  # is what a new basis has to see more than one micro-batch of one process?
    parts = shape.parts
    strategy = strategy_class(parts, hyper)
    draws = _draws(strategy, hyper, parts.num_blocks)
    worst = _worst(draws, parts)
    outside = parts.parameters((), hyper.always_on)
    specs = strategy.specs_for(worst)
    parameters = dict(_all(parts, specs))
    state = sum(
        (planned_state_bytes(tuple(p.shape), p.dtype, specs[n], policy) for n, p in parameters.items()), HeldBytes()
    )
    bottom = any(name in outside for name, _ in parts.groups["embeddings"])
    low = 0 if bottom else min(min(draw) for draw in draws)
    model = StreamedModel(parts, placement)
    recompute = recompute or placement.streams
    optimizer = state.moments + state.projectors
    if placement.streams:
        held, moments, host = _streamed(shape, model, worst, low, specs, parameters, hyper, batch, accum, tokens)
        gradients, activations, logits = moments.gradients, moments.activations, moments.logits
        peak = held + state.masters + optimizer + moments.peak
    else:
        plain = resident_peak(
            shape, parameters, specs, low=low, drawn=len(worst), batch=batch, tokens=tokens, accumulates=accum > 1,
            together=together, recompute=recompute,
        )  # fmt: skip
        held, host = weight_bytes(parts.model, shape.injected), None
        gradients, activations, logits = plain.gradients, plain.activations + plain.in_backward, plain.logits
        peak = held + state.masters + optimizer + plain.peak
    kinds = {
        "weights": held,
        "masters": state.masters,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "logits": logits,
    }
    total = shape.parameters
    always = sum(p.numel() for p in outside.values())
    named = strategy.specs_for(range(parts.num_blocks))
    inside = [sum(p.numel() for name, p in block if name in named) for block in parts.blocks]
    mean = float(np.mean([sum(inside[block] for block in draw) for draw in draws]))
    depths = [parts.num_blocks - (0 if bottom else min(draw)) for draw in draws]
    return Plan(
        bytes=kinds | {"total": peak},
        trainable={"per_step": (mean + always) / total, "always_on": always / total},
        backward_depth={"expected": float(np.mean(depths)), "blocks": parts.num_blocks},
        compute={"of_full": _compute(parts, draws, named.keys() | outside.keys(), outside, bottom, recompute)},
        traffic=traffic(
            model, draws, inside, tokens=batch * accum * tokens, bottom=bottom, rates=rates, recompute=recompute
        ),
        host=host,
    )


def parked_bytes(shape: ModelSpec, strategy: Strategy, hyper: StrategyConfig, policy: MasterPolicy) -> int:
    """Moments and bases that wait for their blocks once every block that can be drawn was: at most so many bytes."""
    parts = shape.parts
    draws = set(_draws(strategy, hyper, parts.num_blocks))
    drawn = sorted(set().union(*draws))

    def held(blocks: Iterable[int]) -> int:
        specs = strategy.specs_for(blocks)
        inside = parts.parameters(blocks, ())
        state = [
            planned_state_bytes(tuple(p.shape), p.dtype, specs[n], policy) for n, p in inside.items() if n in specs
        ]
        return sum(s.moments + s.projectors for s in state)

    return held(drawn) - min(held(draw) for draw in draws)


def _compute(
    parts: ModelParts, draws: list[tuple[int, ...]], trained: Collection[str], outside: Collection[str], bottom: bool,
    recompute: bool,
) -> float:  # fmt: skip
    """Multiplications by weights in a step, as a share of full fine-tuning's without recomputation; scores of attention
    left out. Of a matrix that is passed: one unit forward, one for the gradient of its input where backward comes by,
    one for its own gradient where it is trained, one more forward where it is recomputed."""
    sizes = [[(name, p.numel()) for name, p in block if p.ndim > 1] for block in parts.blocks]
    whole = [sum(size for _, size in block) for block in sizes]
    own = [sum(size for name, size in block if name in trained) for block in sizes]
    head = {name: p.numel() for name, p in parts.groups["head"]}  # tied embeddings are multiplied by here
    at_head = sum(head.values()) * 2 + sum(size for name, size in head.items() if name in outside)
    costs = []
    for draw, count in Counter(draws).items():
        low = 0 if bottom else min(draw)
        reached = sum(whole[low:]) * (2 if recompute else 1)
        costs.append(count * (sum(whole) + reached + sum(own[block] for block in draw) + at_head))
    return float(sum(costs)) / len(draws) / (3 * (sum(whole) + sum(head.values())))


def _streamed(
    shape: ModelSpec,
    model: StreamedModel,
    drawn: tuple[int, ...],
    low: int,
    specs: Mapping[str, UpdateSpec],
    parameters: Mapping[str, nn.Parameter],
    hyper: StrategyConfig,
    batch: int,
    accum: int,
    tokens: int,
) -> tuple[int, PeakBytes, dict[str, int]]:
    """(weights on the device, the step's moments, bytes on the host) of a run whose blocks are walked one by one."""
    footprint = shape.footprint
    load = MicroBatchBytes(
        accum=accum,
        boundary=int(batch * footprint.boundary(tokens)),
        block=int(batch * footprint.trained(tokens)),
        frozen_block=int(batch * footprint.frozen(tokens)),
        outside=int(batch * footprint.outside(tokens)),
        logits=logits_bytes(shape, batch * tokens),
    )
    outside, left = model.outside_bytes(hyper.always_on)
    held = outside + sum(model.device_bytes(drawn).values())
    moments = streamed_peak(model, load, drawn=drawn, low=low, specs=specs, parameters=parameters)
    return held, moments, model.host_bytes(load, low, left)


def _draws(strategy: Strategy, hyper: StrategyConfig, blocks: int) -> list[tuple[int, ...]]:
    """Draws of many periods; a method that samples nothing has one."""
    if "draw" not in strategy.accepted_options:
        return [strategy.blocks_at(0)]
    periods = DRAWS_FOR_DEPTH if hyper.draw == "exact" else min(DRAWS_FOR_DEPTH, 4 * blocks)
    return list(_drawn(hyper.draw, tuple(hyper.inclusion.tolist()), hyper.seed, periods))


@lru_cache(maxsize=4)
def _drawn(draw: str, inclusion: tuple[float, ...], seed: int, periods: int) -> tuple[tuple[int, ...], ...]:
    pi = np.array(inclusion)
    return tuple(DRAWS[draw](pi, seed, period) for period in range(periods))


def _worst(draws: list[tuple[int, ...]], parts: ModelParts) -> tuple[int, ...]:
    """The draw with the most parameters."""
    sizes = [sum(p.numel() for _, p in block) for block in parts.blocks]
    return max(draws, key=lambda draw: sum(sizes[block] for block in draw))


def _all(parts: ModelParts, specs: Mapping[str, UpdateSpec]) -> list[tuple[str, nn.Parameter]]:
    everything = parts.parameters(range(parts.num_blocks), parts.groups)
    return [(name, everything[name]) for name in specs]

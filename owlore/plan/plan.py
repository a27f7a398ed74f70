"""`owlore plan`: bytes by kind before anything is trained, from the configuration of the model alone.

Weights, masters, gradients and optimizer state follow from shapes and are exact. Activations are counted on two blocks
(`footprint`) and scaled to the batch. All figures are for the worst draw that the table allows, which is what has to
fit; `expected` depth is the mean over draws. Each kind is given at its own peak; they do not all peak at one moment
(the logits are freed when backward reaches the blocks), so `total`, the peak of the sum, can be less than their sum.
What the process itself needs (the interpreter, a CUDA context) is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
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
from owlore.plan.resident import resident_peak
from owlore.plan.streamed import StreamedModel, micro_batch_bytes, streamed_peak
from owlore.plan.traffic import Rates, Traffic, traffic
from owlore.residency.placement import Placement
from owlore.sampling import DRAWS
from owlore.strategies import Strategy, StrategyConfig

DRAWS_FOR_DEPTH = 2000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would need.

    Attributes:
        bytes: bytes on the device by kind, and `total`, their peak.
        trainable: shares in [0, 1] of the model's parameters: `per_step`, on average over draws, and `always_on`.
        backward_depth: blocks that backward reaches, `expected` over draws, of `blocks`.
        compute: `of_full`, multiplications of a step as a share of full fine-tuning's, on average over draws.
        traffic: seconds of a step and of its copies.
        host: bytes in host memory by kind; None where no block is streamed or quantised.
        advice: what other settings would save, the largest saving first.
    """

    bytes: dict[str, int]
    trainable: dict[str, float]
    backward_depth: dict[str, float]
    compute: dict[str, float]
    traffic: Traffic
    host: dict[str, int] | None = None
    advice: tuple[Advice, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
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
    model_spec: ModelSpec,
    strategy_class: type[Strategy],
    config: StrategyConfig,
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
    """Plan a run, in each of its processes.

    A process holds what a single one does, and accumulates full gradients as with several micro-batches, because a new
    basis is found from the gradients of all.

    Args:
        model_spec: the model.
        strategy_class: the method.
        config: the settings that the method reads.
        policy: how 16-bit parameters take updates.
        batch: sequences of a micro-batch.
        accum: micro-batches of a step in each process.
        tokens: tokens of a sequence.
        recompute: whether activations are recomputed in backward; streamed blocks always do.
        placement: where frozen blocks are kept and in which format.
        rates: bandwidth and speed of the device.
        processes: processes that train together.

    Raises:
        UsageError: blocks would be streamed in several processes.
    """
    if processes > 1 and placement.streams:
        raise UsageError(f"got {processes} processes and streamed blocks, expected one process; leave --processes out")
    parts = model_spec.parts
    strategy = strategy_class(parts, config)
    draws = _draws(strategy, parts.num_blocks)
    sizes = [sum(p.numel() for _, p in block) for block in parts.blocks]
    worst = max(draws, key=lambda draw: sum(sizes[block] for block in draw))
    outside = parts.parameters((), config.always_on)
    specs = strategy.specs_for(worst)
    everything = parts.parameters(range(parts.num_blocks), parts.groups)
    parameters = {name: everything[name] for name in specs}
    state = _state_bytes(parameters, specs, policy)
    to_embeddings = any(name in outside for name, _ in parts.groups["embeddings"])
    lows = [0 if to_embeddings else min(draw) for draw in draws]
    model = StreamedModel(parts, placement)
    recompute = recompute or placement.streams
    if placement.streams:
        micro_batch = micro_batch_bytes(model_spec, batch=batch, accum=accum, tokens=tokens)
        on_device, on_host = model.outside_bytes(config.always_on)
        weights = on_device + sum(model.device_bytes(worst).values())
        peak = streamed_peak(model, micro_batch, drawn=worst, lowest=min(lows), specs=specs, parameters=parameters)
        host = model.host_bytes(micro_batch, min(lows), on_host)
    else:
        weights, host = weight_bytes(parts.model, model_spec.injected), None
        peak = resident_peak(
            model_spec, parameters, specs, lowest=min(lows), drawn=len(worst), batch=batch, accum=accum, tokens=tokens,
            processes=processes, recompute=recompute,
        )  # fmt: skip
    optimizer = state.moments + state.projectors
    kinds = {
        "weights": weights,
        "masters": state.masters,
        "gradients": peak.gradients,
        "optimizer": optimizer,
        "activations": peak.activations,
        "logits": peak.logits,
        "total": weights + state.masters + optimizer + peak.peak,
    }
    always = sum(p.numel() for p in outside.values())
    named = strategy.specs_for(range(parts.num_blocks))
    inside = [sum(p.numel() for name, p in block if name in named) for block in parts.blocks]
    mean = float(np.mean([sum(inside[block] for block in draw) for draw in draws]))
    total = model_spec.parameters
    return Plan(
        bytes=kinds,
        trainable={"per_step": (mean + always) / total, "always_on": always / total},
        backward_depth={
            "expected": float(np.mean([parts.num_blocks - low for low in lows])),
            "blocks": parts.num_blocks,
        },
        compute={"of_full": _compute(parts, draws, lows, named.keys(), outside.keys(), recompute)},
        traffic=traffic(
            model, draws, inside, tokens=batch * accum * tokens, bottom=to_embeddings, rates=rates, recompute=recompute
        ),
        host=host,
    )


def parked_bytes(model_spec: ModelSpec, strategy: Strategy, policy: MasterPolicy) -> int:
    """Most bytes of moments and bases that wait for their blocks, when every block that can be drawn was drawn."""
    parts = model_spec.parts
    draws = set(_draws(strategy, parts.num_blocks))

    def held(blocks: Collection[int]) -> int:
        specs = strategy.specs_for(blocks)
        inside = {name: p for name, p in parts.parameters(blocks, ()).items() if name in specs}
        state = _state_bytes(inside, specs, policy)
        return state.moments + state.projectors

    return held(sorted(set().union(*draws))) - min(map(held, draws))


def _state_bytes(
    parameters: Mapping[str, nn.Parameter], specs: Mapping[str, UpdateSpec], policy: MasterPolicy
) -> HeldBytes:
    planned = (planned_state_bytes(tuple(p.shape), p.dtype, specs[name], policy) for name, p in parameters.items())
    return sum(planned, HeldBytes())


def _compute(
    parts: ModelParts,
    draws: list[tuple[int, ...]],
    lows: list[int],
    trained: Collection[str],
    outside: Collection[str],
    recompute: bool,
) -> float:
    """Multiplications by weights in a step, as a share of full fine-tuning's without recomputation.

    A matrix counts once in forward, once where backward computes the gradient of its input, once where it is trained,
    and once more where it is recomputed. Attention scores are not counted.
    """
    matrices = [[(name, p.numel()) for name, p in block if p.ndim > 1] for block in parts.blocks]
    sizes = [sum(size for _, size in block) for block in matrices]
    trained_sizes = [sum(size for name, size in block if name in trained) for block in matrices]
    head = {name: p.numel() for name, p in parts.groups["head"]}  # tied embeddings are multiplied by here
    at_head = sum(head.values()) * 2 + sum(size for name, size in head.items() if name in outside)
    costs = []
    for (draw, low), count in Counter(zip(draws, lows, strict=True)).items():
        reached = sum(sizes[low:]) * (2 if recompute else 1)
        costs.append(count * (sum(sizes) + reached + sum(trained_sizes[block] for block in draw) + at_head))
    return float(sum(costs)) / len(draws) / (3 * (sum(sizes) + sum(head.values())))


def _draws(strategy: Strategy, blocks: int) -> list[tuple[int, ...]]:
    """Draws of many periods; a method that samples nothing has one."""
    config = strategy.config
    if "draw" not in strategy.accepted_options:
        return [strategy.blocks_at(0)]
    periods = DRAWS_FOR_DEPTH if config.draw == "exact" else min(DRAWS_FOR_DEPTH, 4 * blocks)
    return list(_drawn(config.draw, tuple(config.inclusion.tolist()), config.seed, periods))


@lru_cache(maxsize=4)
def _drawn(draw: str, inclusion: tuple[float, ...], seed: int, periods: int) -> tuple[tuple[int, ...], ...]:
    pi = np.array(inclusion)
    return tuple(DRAWS[draw](pi, seed, period) for period in range(periods))

"""`owlore plan`: bytes by kind before anything is trained, from the configuration of the model alone.

Weights, masters, gradients and optimizer state follow from shapes and are exact. Activations are counted on two blocks
(`footprint`) and scaled to the batch. All figures are for the worst draw that the table allows, which is what has to
fit; `expected` depth is the mean over draws. Each kind is given at its own peak; they do not all peak at one moment
(the logits are gone when backward reaches the blocks), so `total`, the peak of the whole, can be less than their sum.
What the process itself needs (the interpreter, a CUDA context) comes on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from htsr import LayerTable
from htsr.console import quiet_libraries
from htsr.errors import BadInput, HtsrError, UsageError
from htsr.model.locate import locate
from owlore.attach import Attached
from owlore.blocks import Units, find_units
from owlore.config import TrainConfig
from owlore.data.prepare import prepare
from owlore.kernels.cross_entropy import chunk_rows
from owlore.optim import Rule, Weights
from owlore.optim.slot import HeldBytes, planned_bytes
from owlore.sampling import DRAWS
from owlore.strategies import Hyper, Start, Strategy
from owlore.train.advice import Advice, advise
from owlore.train.footprint import Footprint, measure_footprint
from owlore.train.loading import DTYPES, pick_device
from owlore.train.settings import hyper_of, recomputes, resolve, weights_of
from owlore.train.streaming_plan import (
    Homes,
    Load,
    Moments,
    Rates,
    StreamedModel,
    Traffic,
    gathered_bytes,
    traffic,
    walk_moments,
)
from owlore.train.tables import DEFAULT_GAMMA, find_table, run_inclusion

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


def plan_from_config(
    config: TrainConfig,
    say: Callable[[str], None],
    rates: Rates | None = None,
    *,
    advice: bool = False,
    processes: int = 1,
) -> Plan:
    """The plan of `owlore train` with these arguments; reads the model's configuration and, where named, the data.

    Rows are taken as long as the longest one of the data, without data as `--seq-len` allows. Without a table file
    the draws are taken as uniform: a scan needs the weights. advice: plan other settings too, and say what they save.
    processes: that train together; the bytes are those of each.
    """
    config, strategy = resolve(config)
    planner = planner_of(config, strategy, say, rates or Rates(), processes)
    return planner.advised(config) if advice else planner.plan(config)


def planner_of(
    config: TrainConfig, strategy: type[Strategy], say: Callable[[str], None], rates: Rates, processes: int = 1
) -> Planner:
    """A planner of the model, table and data that `config` names."""
    device = pick_device(config.device).type

    def describe(other: TrainConfig) -> Shape:
        return model_shape(other, device, strategy=strategy)

    planner = Planner(strategy, describe, device=device, rates=rates, processes=processes)
    shape = planner.shape(config)
    planner.table = _table(config, strategy, shape.units.num_blocks, say)
    planner.tokens = _longest(config, shape.positions)
    return planner


class Planner:
    """Plans of one model and method under different settings.

    describe: the model's shape under some settings. table: of its layers, None where nothing is sampled. tokens: of the
    longest row. device: its type; on the CPU what is parked on the host lies in the same memory. processes: that train
    together.
    """

    def __init__(
        self,
        strategy: type[Strategy],
        describe: Callable[[TrainConfig], Shape],
        *,
        device: str,
        table: LayerTable | None = None,
        tokens: int = 0,
        rates: Rates = Rates(),  # noqa: B008 - frozen
        processes: int = 1,
    ) -> None:
        self.rates, self.processes = rates, processes
        self.strategy, self.describe, self.device, self.table, self.tokens = strategy, describe, device, table, tokens
        self._shapes: dict[tuple[Any, ...], Shape] = {}

    def shape(self, config: TrainConfig) -> Shape:
        """The model under these settings, described once for each kind."""
        kind = (config.dtype, config.weights == "fp32", config.packing, config.attn)
        if kind not in self._shapes:
            self._shapes[kind] = self.describe(config)
        return self._shapes[kind]

    def advised(self, config: TrainConfig) -> Plan:
        """The plan, with what other settings would save."""
        made = self.plan(config)
        return replace(made, advice=advise(config, made, self.plan))

    def plan(self, config: TrainConfig) -> Plan:
        """The plan under these (resolved) settings."""
        table, shape = self.table, self.shape(config)
        inclusion = None if table is None else run_inclusion(table, active=config.active, floor=config.floor)
        hyper = hyper_of(config, inclusion, shape.attached)
        made = make_plan(
            shape,
            self.strategy,
            hyper,
            weights=weights_of(config),
            batch=config.batch,
            accum=config.accum,
            processes=self.processes,
            tokens=min(self.tokens, config.seq_len),
            recompute=recomputes(config, shape.units),
            homes=homes_of(config),
            rates=self.rates,
        )
        if config.on_switch == "keep" or (config.on_switch == "host" and self.device == "cpu"):
            parked = parked_bytes(shape, self.strategy(shape.units, hyper), hyper, weights_of(config))
            made = replace(made, bytes=made.bytes | {k: made.bytes[k] + parked for k in ("optimizer", "total")})
        return made


def parked_bytes(shape: Shape, strategy: Strategy, hyper: Hyper, weights: Weights) -> int:
    """Moments and bases that wait for their blocks once every block that can be drawn was: at most so many bytes."""
    units = shape.units
    draws = set(_draws(strategy, hyper, units.num_blocks))
    drawn = sorted(set().union(*draws))

    def held(blocks: Iterable[int]) -> int:
        rules = strategy.rules_for(blocks)
        inside = units.parameters(blocks, ())
        state = [planned_bytes(tuple(p.shape), p.dtype, rules[n], weights) for n, p in inside.items() if n in rules]
        return sum(s.moments + s.projectors for s in state)

    return held(drawn) - min(held(draw) for draw in draws)


def homes_of(config: TrainConfig) -> Homes:
    """Where the configuration wants frozen blocks to live."""
    return Homes(
        residency=config.residency,
        resident_share=config.resident_share,
        frozen=config.frozen,
        offload=config.offload_activations,
    )


def _table(
    config: TrainConfig, strategy: type[Strategy], num_blocks: int, say: Callable[[str], None]
) -> LayerTable | None:
    def unscanned() -> LayerTable:
        say("note: the layer table is not known without a scan; the draws are taken as uniform")
        return LayerTable.uniform(num_blocks, min(DEFAULT_GAMMA, num_blocks))

    wanted = config.table if strategy.table is not None else None
    return find_table(wanted, num_blocks=num_blocks, scan=unscanned, say=say, weights_sha256="")


def _longest(config: TrainConfig, positions: int | None) -> int:
    limit = min(config.seq_len, positions or config.seq_len)
    if config.data is None or config.packing:  # packed sequences are filled up to the limit
        return limit
    from transformers import AutoTokenizer

    path = locate(str(config.model))
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    with quiet_libraries():
        tokenizer = AutoTokenizer.from_pretrained(path.parent if gguf else path, **gguf)
    return prepare(config.data, tokenizer, seq_len=limit).report.longest


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model known by its configuration: units on the meta device and what a sequence costs.

    parameters: of the model alone; `attached` is what the method put into it.
    """

    units: Units
    parameters: int
    attached: Attached | None
    footprint: Footprint
    dtype: torch.dtype
    hidden: int
    vocabulary: int
    positions: int | None


def model_shape(config: TrainConfig, device: str = "cpu", *, strategy: type[Strategy] = Strategy) -> Shape:
    """The model that `config.model` names, without its weights, as the method prepares it.

    Raises: NotFound, BadInput (no configuration of a causal language model).
    """
    from transformers import AutoConfig

    path = locate(str(config.model))
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    try:
        with quiet_libraries():
            described = AutoConfig.from_pretrained(path.parent if gguf else path, **gguf)
        return shape_of_config(described, _dtype(config, described, bool(gguf), device), config, strategy)
    except HtsrError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{config.model} has no configuration of a causal language model: {error}") from error


def shape_of_config(described: Any, dtype: torch.dtype, config: TrainConfig, strategy: type[Strategy]) -> Shape:
    """The shape of the model that a transformers configuration describes; no weights are made."""
    from transformers import AutoModelForCausalLM

    with quiet_libraries(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described, dtype=dtype)
    return shape_of(model, attn=config.attn, strategy=strategy, own=config.set or {}, packed=config.packing)


def shape_of(
    model: Any,
    *,
    attn: str = "sdpa",
    strategy: type[Strategy] = Strategy,
    own: Mapping[str, Any] | None = None,
    packed: bool = False,
) -> Shape:
    """The shape of a model object, which the method prepares; its parameters may be on the meta device."""
    text = model.config.get_text_config()
    dtype = next(model.parameters()).dtype
    parameters = sum(p.numel() for p in model.parameters())
    start = Start(own=own or {}, seed=0)

    def names(toy: nn.Module) -> frozenset[str] | None:
        attached = strategy.prepare(toy, start)
        return None if attached is None else attached.trained

    prepare = names if strategy.adapts else None
    footprint = measure_footprint(model.config, dtype=dtype, attn=attn, prepare=prepare, packed=packed)
    attached = strategy.prepare(model, start)
    return Shape(
        units=find_units(model),
        parameters=parameters,
        attached=attached,
        footprint=footprint,
        dtype=dtype,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None),
    )


def make_plan(
    shape: Shape,
    strategy_class: type[Strategy],
    hyper: Hyper,
    *,
    weights: Weights,
    batch: int,
    accum: int,
    tokens: int,
    recompute: bool,
    homes: Homes = Homes(),  # noqa: B008 - frozen
    rates: Rates = Rates(),  # noqa: B008
    processes: int = 1,
) -> Plan:
    """Bytes of a run with `batch` sequences of `tokens` tokens a micro-batch, in each of its processes.

    A process holds what a single one does, and gathers as with accumulation: a new basis waits for the gradients of
    all. Raises: UsageError for blocks that stream in several.
    """
    if processes > 1 and homes.streams:
        raise UsageError(f"got {processes} processes and streamed blocks, expected one process; leave --processes out")
    together = max(accum, min(processes, 2))  # is what a new basis has to see more than one micro-batch of one process?
    units = shape.units
    strategy = strategy_class(units, hyper)
    draws = _draws(strategy, hyper, units.num_blocks)
    worst = _worst(draws, units)
    outside = units.parameters((), hyper.always_on)
    rules = strategy.rules_for(worst)
    parameters = dict(_all(units, rules))
    state = sum((planned_bytes(tuple(p.shape), p.dtype, rules[n], weights) for n, p in parameters.items()), HeldBytes())
    bottom = any(name in outside for name, _ in units.groups["embeddings"])
    low = 0 if bottom else min(min(draw) for draw in draws)
    model = StreamedModel(units, homes)
    recompute = recompute or homes.streams
    optimizer = state.moments + state.projectors
    if homes.streams:
        held, moments, host = _streamed(shape, model, worst, low, rules, parameters, hyper, batch, accum, tokens)
        gradients, activations, logits = moments.gradients, moments.activations, moments.logits
        peak = held + state.masters + optimizer + moments.peak
    else:
        plain = _Moments(
            gradients=gradient_bytes(parameters, rules, together),
            arriving=arriving_bytes(parameters, rules),
            activations=_activations(shape, low, len(worst), batch, tokens, recompute),
            block=int(batch * shape.footprint.trained(tokens) + shape.footprint.trained.fixed),
            logits=_logits(shape, batch * tokens),
            head=_head_gradient(units, parameters),
            recompute=recompute,
            accumulates=accum > 1,
        )
        held, host = weight_bytes(units.model, shape.attached), None
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
    named = strategy.rules_for(range(units.num_blocks))
    inside = [sum(p.numel() for name, p in block if name in named) for block in units.blocks]
    mean = float(np.mean([sum(inside[block] for block in draw) for draw in draws]))
    depths = [units.num_blocks - (0 if bottom else min(draw)) for draw in draws]
    return Plan(
        bytes=kinds | {"total": peak},
        trainable={"per_step": (mean + always) / total, "always_on": always / total},
        backward_depth={"expected": float(np.mean(depths)), "blocks": units.num_blocks},
        compute={"of_full": _compute(units, draws, named.keys() | outside.keys(), outside, bottom, recompute)},
        traffic=traffic(
            model, draws, inside, tokens=batch * accum * tokens, bottom=bottom, rates=rates, recompute=recompute
        ),
        host=host,
    )


def _compute(
    units: Units, draws: list[tuple[int, ...]], trained: Collection[str], outside: Collection[str], bottom: bool,
    recompute: bool,
) -> float:  # fmt: skip
    """Multiplications by weights in a step, as a share of full fine-tuning's without recomputation; scores of attention
    left out. Of a matrix that is passed: one unit forward, one for the gradient of its input where backward comes by,
    one for its own gradient where it is trained, one more forward where it is recomputed."""
    sizes = [[(name, p.numel()) for name, p in block if p.ndim > 1] for block in units.blocks]
    whole = [sum(size for _, size in block) for block in sizes]
    own = [sum(size for name, size in block if name in trained) for block in sizes]
    head = {name: p.numel() for name, p in units.groups["head"]}  # tied embeddings are multiplied by here
    at_head = sum(head.values()) * 2 + sum(size for name, size in head.items() if name in outside)
    costs = []
    for draw, count in Counter(draws).items():
        low = 0 if bottom else min(draw)
        reached = sum(whole[low:]) * (2 if recompute else 1)
        costs.append(count * (sum(whole) + reached + sum(own[block] for block in draw) + at_head))
    return float(sum(costs)) / len(draws) / (3 * (sum(whole) + sum(head.values())))


def _streamed(
    shape: Shape,
    model: StreamedModel,
    drawn: tuple[int, ...],
    low: int,
    rules: Mapping[str, Rule],
    parameters: Mapping[str, nn.Parameter],
    hyper: Hyper,
    batch: int,
    accum: int,
    tokens: int,
) -> tuple[int, Moments, dict[str, int]]:
    """(weights on the device, the step's moments, bytes on the host) of a run whose blocks are walked one by one."""
    footprint = shape.footprint
    load = Load(
        accum=accum,
        boundary=int(batch * footprint.boundary(tokens)),
        block=int(batch * footprint.trained(tokens)),
        frozen_block=int(batch * footprint.frozen(tokens)),
        outside=int(batch * footprint.outside(tokens)),
        logits=_logits(shape, batch * tokens),
    )
    outside, left = model.outside_bytes(hyper.always_on)
    held = outside + sum(model.device_bytes(drawn).values())
    moments = walk_moments(model, load, drawn=drawn, low=low, rules=rules, parameters=parameters)
    return held, moments, model.host_bytes(load, low, left)


@dataclass(frozen=True, kw_only=True)
class _Moments:
    """Bytes that come and go within a step, and the larger of the two moments that can be the peak."""

    gradients: int
    arriving: int
    activations: int
    block: int
    logits: int
    head: int  # gradient of a trained head: made with the loss, before any activation goes
    recompute: bool
    accumulates: bool

    @property
    def in_backward(self) -> int:
        """Beyond what was kept: gradients of a block's activations, about a third of what it saves; and, when
        activations are recomputed, one block's own."""
        return self.block // 3 + (self.block if self.recompute else 0)

    @property
    def peak(self) -> int:
        """At the loss all activations and a chunk of logits are held. In backward, activations go as gradients come:
        the larger of the two counts. What earlier micro-batches gathered stands through all of a later one."""
        if self.accumulates:
            return self.gradients + self.activations + max(self.logits, self.in_backward)
        kept = max(self.activations + (0 if self.recompute else self.arriving), self.gradients)
        return max(self.activations + self.logits + self.head, kept + self.in_backward)


def gradient_bytes(parameters: Mapping[str, nn.Parameter], rules: Mapping[str, Rule], accum: int) -> int:
    """Most bytes of gradients at once: what is gathered, and the one matrix that is arriving.

    A step that looks for new bases with accumulation gathers those matrices' sums whole; so does every step of an
    update of full rank, beside the projected one.
    """
    gathered = 0
    for name, parameter in parameters.items():
        rule = rules[name]
        together = accum > 1 and not rule.whole
        gathered += 4 * parameter.numel() if together else gathered_bytes(rule, parameter)
    return gathered + arriving_bytes(parameters, rules)


def arriving_bytes(parameters: Mapping[str, nn.Parameter], rules: Mapping[str, Rule]) -> int:
    """The largest gradient that exists for the moment of its hook: as autograd made it, and in fp32."""
    sizes = [
        p.numel() * (p.element_size() + (0 if p.dtype == torch.float32 else 4))
        for name, p in parameters.items()
        if rules[name].projects(p.shape) or p.dtype != torch.float32
    ]
    return max(sizes, default=0)


def _activations(shape: Shape, low: int, active: int, batch: int, tokens: int, recompute: bool) -> int:
    """Saved for backward when the forward is done."""
    footprint, blocks = shape.footprint, shape.units.num_blocks - low
    if recompute:
        kept, fixed = blocks * footprint.boundary(tokens), 0.0
    else:
        kept = active * footprint.trained(tokens) + max(0, blocks - active) * footprint.frozen(tokens)
        fixed = active * footprint.trained.fixed + max(0, blocks - active) * footprint.frozen.fixed
    return int(batch * (kept + footprint.outside(tokens)) + fixed)


def _logits(shape: Shape, tokens: int) -> int:
    """One chunk of logits in fp32 (and, for a moment, in 16 bits), and the hidden states that are given to the head
    with their gradient."""
    size = torch.empty((), dtype=shape.dtype).element_size()
    rows = min(chunk_rows(shape.vocabulary), tokens)
    return rows * shape.vocabulary * (4 if size == 4 else 4 + size) + 2 * tokens * shape.hidden * size


def _head_gradient(units: Units, trained: Mapping[str, nn.Parameter]) -> int:
    """Bytes of the head's gradient while the loss is computed, summed in fp32; in 16 bits a chunk's part beside it."""
    sizes = [p.numel() * (4 if p.element_size() == 4 else 4 + p.element_size())
             for name, p in units.groups["head"] if name in trained]  # fmt: skip
    return sum(sizes)


def _draws(strategy: Strategy, hyper: Hyper, blocks: int) -> list[tuple[int, ...]]:
    """Draws of many periods; a method that samples nothing has one."""
    if "draw" not in strategy.reads:
        return [strategy.blocks_at(0)]
    periods = DRAWS_FOR_DEPTH if hyper.draw == "exact" else min(DRAWS_FOR_DEPTH, 4 * blocks)
    return list(_drawn(hyper.draw, tuple(hyper.inclusion.tolist()), hyper.seed, periods))


@lru_cache(maxsize=4)
def _drawn(draw: str, inclusion: tuple[float, ...], seed: int, periods: int) -> tuple[tuple[int, ...], ...]:
    pi = np.array(inclusion)
    return tuple(DRAWS[draw](pi, seed, period) for period in range(periods))


def _worst(draws: list[tuple[int, ...]], units: Units) -> tuple[int, ...]:
    """The draw with the most parameters."""
    sizes = [sum(p.numel() for _, p in block) for block in units.blocks]
    return max(draws, key=lambda draw: sum(sizes[block] for block in draw))


def _all(units: Units, rules: Mapping[str, Rule]) -> list[tuple[str, nn.Parameter]]:
    everything = units.parameters(range(units.num_blocks), units.groups)
    return [(name, everything[name]) for name in rules]


def weight_bytes(model: nn.Module, attached: Attached | None) -> int:
    """Bytes of the weights; with an adapter also of what it keeps in buffers (frozen first values, codes, indexes)."""
    held = _bytes(model.parameters())
    return held if attached is None else held + _bytes(stored_buffers(model)) - attached.saves_bytes


def stored_buffers(model: nn.Module) -> list[torch.Tensor]:
    """Buffers that belong to the state of a model; what it computes anew (rotary frequencies) is left out."""
    names = model.state_dict().keys()
    return [buffer for name, buffer in model.named_buffers() if name in names]


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _dtype(config: TrainConfig, described: Any, gguf: bool, device: str) -> torch.dtype:
    if config.weights == "fp32":
        return torch.float32
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if gguf:
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return getattr(described.get_text_config(), "dtype", None) or torch.float32

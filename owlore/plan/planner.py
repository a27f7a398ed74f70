"""`owlore plan`: the plan of a run from its configuration, with what other settings would save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from htsr import LayerTable
from htsr.console import quiet_libraries
from htsr.model.locate import locate
from owlore.config import TrainConfig
from owlore.data.prepare import prepare
from owlore.layer_table import DEFAULT_GAMMA, find_table, run_inclusion
from owlore.models.loading import pick_device
from owlore.plan.advice import advise
from owlore.plan.model_spec import ModelSpec, model_spec
from owlore.plan.plan import Plan, make_plan, parked_bytes
from owlore.plan.traffic import Rates
from owlore.settings import master_policy, placement_of, recomputes, resolve, strategy_config
from owlore.strategies import Strategy


def plan_from_config(
    config: TrainConfig,
    notify: Callable[[str], None],
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
    planner = planner_of(config, strategy, notify, rates or Rates(), processes)
    return planner.advised(config) if advice else planner.plan(config)


def planner_of(
    config: TrainConfig, strategy: type[Strategy], notify: Callable[[str], None], rates: Rates, processes: int = 1
) -> Planner:
    """A planner of the model, table and data that `config` names."""
    device = pick_device(config.device).type

    def describe(other: TrainConfig) -> ModelSpec:
        return model_spec(other, device, strategy=strategy)

    planner = Planner(strategy, describe, device=device, rates=rates, processes=processes)
    shape = planner.shape(config)
    planner.table = _table(config, strategy, shape.parts.num_blocks, notify)
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
        describe: Callable[[TrainConfig], ModelSpec],
        *,
        device: str,
        table: LayerTable | None = None,
        tokens: int = 0,
        rates: Rates = Rates(),  # noqa: B008 - frozen
        processes: int = 1,
    ) -> None:
        self.rates, self.processes = rates, processes
        self.strategy, self.describe, self.device, self.table, self.tokens = strategy, describe, device, table, tokens
        self._shapes: dict[tuple[Any, ...], ModelSpec] = {}

    def shape(self, config: TrainConfig) -> ModelSpec:
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
        hyper = strategy_config(config, inclusion, shape.injected)
        made = make_plan(
            shape,
            self.strategy,
            hyper,
            policy=master_policy(config),
            batch=config.batch,
            accum=config.accum,
            processes=self.processes,
            tokens=min(self.tokens, config.seq_len),
            recompute=recomputes(config, shape.parts),
            placement=placement_of(config),
            rates=self.rates,
        )
        if config.on_switch == "keep" or (config.on_switch == "host" and self.device == "cpu"):
            parked = parked_bytes(shape, self.strategy(shape.parts, hyper), hyper, master_policy(config))
            made = replace(made, bytes=made.bytes | {k: made.bytes[k] + parked for k in ("optimizer", "total")})
        return made


def _table(
    config: TrainConfig, strategy: type[Strategy], num_blocks: int, notify: Callable[[str], None]
) -> LayerTable | None:
    def unscanned() -> LayerTable:
        notify("note: the layer table is not known without a scan; the draws are taken as uniform")
        return LayerTable.uniform(num_blocks, min(DEFAULT_GAMMA, num_blocks))

    wanted = config.table if strategy.table is not None else None
    return find_table(wanted, num_blocks=num_blocks, scan=unscanned, notify=notify, weights_sha256="")


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

"""`owlore plan`: the plan of a run from its configuration, with what other settings would save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from htsr import LayerTable
from htsr.console import quiet_libraries
from owlore.config import TrainConfig
from owlore.data.prepare import prepare
from owlore.layer_table import DEFAULT_GAMMA, find_table
from owlore.models.loading import pick_device
from owlore.plan.advice import advise
from owlore.plan.model_spec import ModelSpec, model_files, spec_of_files
from owlore.plan.plan import Plan, make_plan, parked_bytes
from owlore.plan.traffic import Rates
from owlore.settings import master_policy, placement_of, recomputes, resolve, strategy_config
from owlore.strategies import Strategy


def plan_from_config(
    config: TrainConfig,
    notify: Callable[[str], None],
    rates: Rates = Rates(),  # noqa: B008 - frozen
    *,
    advice: bool = False,
    processes: int = 1,
) -> Plan:
    """Plan `owlore train` with these settings; reads the model's configuration and, where named, the data.

    Rows are taken as long as the longest one of the data, without data as `--seq-len` allows. Without a table file
    the draws are taken as uniform, because a scan needs the weights.

    Args:
        config: the settings.
        notify: is given what the user should know, one line at a time.
        rates: bandwidth and speed of the device.
        advice: whether other settings are planned too, to find what they would save.
        processes: processes that train together; the bytes are those of each.

    Raises:
        HtsrError: the settings do not go together, or the model or data cannot be used.
    """
    config, strategy = resolve(config)
    planner = planner_of(config, strategy, notify, rates, processes)
    return planner.advised(config) if advice else planner.plan(config)


def planner_of(
    config: TrainConfig, strategy: type[Strategy], notify: Callable[[str], None], rates: Rates, processes: int = 1
) -> Planner:
    """Make a planner of the model, table and data that `config` names.

    Args:
        config: the settings, resolved.
        strategy: the method.
        notify: is given what the user should know, one line at a time.
        rates: bandwidth and speed of the device.
        processes: processes that train together.
    """
    device = pick_device(config.device).type
    planner = Planner(
        strategy=strategy,
        describe=lambda other: spec_of_files(other, device, strategy=strategy),
        device=device,
        rates=rates,
        processes=processes,
    )
    model_spec = planner.model_spec(config)
    planner.table = _table(config, strategy, model_spec.parts.num_blocks, notify)
    planner.tokens = _longest_row(config, model_spec.positions)
    return planner


@dataclass(kw_only=True)
class Planner:
    """Plans of one model and method under different settings.

    Attributes:
        strategy: the method.
        describe: gives the model under some settings.
        device: type of the device; on `cpu` what is parked in host memory is in the same memory.
        table: table of the model's layers; None where nothing is sampled.
        tokens: tokens of the longest row.
        rates: bandwidth and speed of the device.
        processes: processes that train together.
    """

    strategy: type[Strategy]
    describe: Callable[[TrainConfig], ModelSpec]
    device: str
    table: LayerTable | None = None
    tokens: int = 0
    rates: Rates = Rates()  # noqa: RUF009 - frozen
    processes: int = 1
    _described: dict[tuple[Any, ...], ModelSpec] = field(default_factory=dict)

    def model_spec(self, config: TrainConfig) -> ModelSpec:
        """The model under these settings; each kind is described once."""
        kind = (config.dtype, config.weights == "fp32", config.packing, config.attn)
        if kind not in self._described:
            self._described[kind] = self.describe(config)
        return self._described[kind]

    def advised(self, config: TrainConfig) -> Plan:
        """The plan, with what other settings would save."""
        made = self.plan(config)
        return replace(made, advice=advise(config, made, self.plan))

    def plan(self, config: TrainConfig) -> Plan:
        """The plan under these (resolved) settings."""
        model_spec, policy = self.model_spec(config), master_policy(config)
        settings = strategy_config(config, self.table, model_spec.injected)
        made = make_plan(
            model_spec,
            self.strategy,
            settings,
            policy=policy,
            batch=config.batch,
            accum=config.accum,
            processes=self.processes,
            tokens=min(self.tokens, config.seq_len),
            recompute=recomputes(config, model_spec.parts),
            placement=placement_of(config),
            rates=self.rates,
        )
        if config.on_switch == "keep" or (config.on_switch == "host" and self.device == "cpu"):
            parked = parked_bytes(model_spec, self.strategy(model_spec.parts, settings), policy)
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


def _longest_row(config: TrainConfig, positions: int | None) -> int:
    limit = min(config.seq_len, positions or config.seq_len)
    if config.data is None or config.packing:  # packed sequences are filled up to the limit
        return limit
    from transformers import AutoTokenizer

    directory, gguf = model_files(config)
    with quiet_libraries():
        tokenizer = AutoTokenizer.from_pretrained(directory, **gguf)
    return prepare(config.data, tokenizer, seq_len=limit).report.longest

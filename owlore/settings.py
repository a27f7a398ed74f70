"""From the configuration to what a run does: method defaults, presets, refused options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from htsr.errors import UsageError
from owlore.blocks import ModelParts
from owlore.config import TrainConfig, refuse_unaccepted
from owlore.injection import InjectedAdapter
from owlore.layer_table import run_inclusion
from owlore.optim import MasterPolicy
from owlore.options import read_method_options
from owlore.residency.placement import Placement
from owlore.strategies import STRATEGIES, Strategy, StrategyConfig

if TYPE_CHECKING:
    from htsr import LayerTable

CHECKPOINTING_FROM = 1_000_000_000  # parameters from which `--checkpointing auto` recomputes activations


def resolve(config: TrainConfig) -> tuple[TrainConfig, type[Strategy]]:
    """Fill in what the user left open: the preset's value if asked for, else the method's default.

    Args:
        config: the settings.

    Returns:
        The settings, with all of the method's own options spelled out, and the method.

    Raises:
        UsageError: an option that the method does not accept was given.
    """
    strategy = STRATEGIES[config.method]
    refuse_unaccepted(config, strategy.accepted_options)
    check_placement(config, adapts=strategy.adapts)
    table = {} if strategy.table is None else {"table": strategy.table}
    preset = strategy.preset if config.preset == "paper" else {}
    options = {**preset.get("set", {}), **(config.set or {})}
    options = read_method_options(strategy.method_options, options, strategy.name)
    return config.with_defaults({**table, **strategy.defaults, **preset}, options), strategy


def strategy_config(
    config: TrainConfig, table: LayerTable | None, injected: InjectedAdapter | None = None
) -> StrategyConfig:
    """The settings that strategies read.

    Args:
        config: the settings, resolved.
        table: the layer table; None where nothing is sampled.
        injected: the adapter that the method put into the model, if any.

    Raises:
        UsageError: `--active` or `--floor` do not fit the table.
    """
    inclusion: Any = None if table is None else run_inclusion(table, active=config.active, floor=config.floor)
    return StrategyConfig(
        seed=config.seed,
        draw=config.draw,
        inclusion=inclusion,
        always_on=config.always_on,
        rank=None if config.rank == "full" else int(config.rank),
        refresh=None if config.refresh == "per-activation" else int(config.refresh),
        scale=config.scale,
        weight_decay=config.weight_decay,
        state_bits=config.state_bits,
        project_always_on=config.project_always_on,
        project_larger=config.project_side == "larger",
        floor=config.floor,
        options=config.set or {},
        trained=frozenset() if injected is None else injected.trained,
    )


def master_policy(config: TrainConfig) -> MasterPolicy:
    """How 16-bit weights take updates."""
    return {"bf16": MasterPolicy.NEAREST, "bf16-sr": MasterPolicy.STOCHASTIC}.get(config.weights, MasterPolicy.MASTER)


def recomputes(config: TrainConfig, parts: ModelParts) -> bool:
    """Whether activations are recomputed in backward; `auto` does so for large models."""
    if config.checkpointing != "auto":
        return config.checkpointing == "on"
    return sum(p.numel() for p in parts.model.parameters()) >= CHECKPOINTING_FROM


def placement_of(config: TrainConfig) -> Placement:
    """Where frozen blocks are kept, and in which format."""
    return Placement(
        residency=config.residency,
        resident_share=config.resident_share,
        frozen=config.frozen,
        offload=config.offload_activations,
    )


def check_placement(config: TrainConfig, *, adapts: bool) -> None:
    """Refuse settings of residency that do not go together.

    Args:
        config: the settings.
        adapts: whether the method trains an adapter.

    Raises:
        UsageError: with the options that exclude each other.
    """
    if config.resident_share and config.residency != "host":
        raise UsageError("--resident-share was given without --residency host; on the device all blocks are resident")
    if config.compile and config.frozen != "bf16":
        raise UsageError(
            f"got --compile with --frozen {config.frozen}, expected one of them: a quantised block is not compiled"
        )
    if adapts and placement_of(config).streams:
        raise UsageError(
            f"--residency host, --frozen and --offload-activations are for methods that train the model's own weights, "
            f"not for {config.method}; leave them out"
        )

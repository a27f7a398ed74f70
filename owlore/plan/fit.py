"""`owlore plan --fit 8GB`: the cheapest settings under which a run fits a device.

Settings that leave every bit as it is come first, then those that round differently, last those that change what is
trained against. Within such a level the least predicted seconds win, and of those the fewest changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from owlore.config import SETTINGS, TrainConfig, flag_name
from owlore.plan.plan import Plan
from owlore.plan.planner import planner_of
from owlore.plan.traffic import Rates
from owlore.settings import placement_of, resolve

LEVELS = ("every bit stays as it is", "states and weights are rounded more coarsely", "frozen blocks are quantised")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """changes: settings to give beside the user's own. level: index into `LEVELS`. None as plan: nothing fits."""

    limit: int
    changes: dict[str, Any]
    level: int
    plan: Plan
    fits: bool

    @property
    def options(self) -> str:
        """The changes as they are typed."""
        words = []
        for name, value in self.changes.items():
            words.append(flag_name(name) if value is True else f"{flag_name(name)} {value}")
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        return {"limit": self.limit, "fits": self.fits, "changes": self.changes, "options": self.options,
                "cost": LEVELS[self.level]}  # fmt: skip


def fit_from_config(config: TrainConfig, limit: int, notify: Callable[[str], None], rates: Rates | None = None) -> Fit:
    """The cheapest settings with which the peak is at most `limit` bytes; where none fits, the smallest found.

    What the user gave stays; only settings that were left open are changed (`--batch` may be split into `--accum`).
    """
    config, strategy = resolve(config)
    planner = planner_of(config, strategy, notify, rates or Rates())
    smallest: Fit | None = None
    tried: list[dict[str, Any]] = []
    for level in range(len(LEVELS)):
        found = []
        for changes in _candidates(config, level, adapts=strategy.adapts):
            if changes in tried:
                continue
            tried.append(changes)
            plan = planner.plan(replace(config, **changes))
            fit = Fit(limit=limit, changes=changes, level=level, plan=plan, fits=plan.bytes["total"] <= limit)
            if fit.fits:
                found.append(fit)
            if smallest is None or plan.bytes["total"] < smallest.plan.bytes["total"]:
                smallest = fit
        if found:
            return min(found, key=_cost)
    assert smallest is not None
    return smallest


def _cost(fit: Fit) -> tuple[float, int, int]:
    return (round(fit.plan.traffic.step_seconds, 4), len(fit.changes), fit.plan.bytes["total"])


def _candidates(config: TrainConfig, level: int, *, adapts: bool) -> Iterator[dict[str, Any]]:
    """Settings to try at a level, as changes to the configuration."""
    open_ = {name for name in SETTINGS if name not in config.fixed}

    def choices(name: str, *values: Any) -> list[Any]:
        now = getattr(config, name)
        return list(dict.fromkeys([now, *values])) if name in open_ else [now]

    placement = {
        "residency": choices("residency", "host"),
        "resident_share": choices("resident_share", 0.25, 0.5, 0.75),
        "offload_activations": choices("offload_activations", True),
    }
    options = {
        "checkpointing": choices("checkpointing", "on"),
        **({} if adapts else placement),
        "state_bits": choices("state_bits", 8) if level >= 1 else [config.state_bits],
        "weights": choices("weights", "bf16-sr") if level >= 1 else [config.weights],
        "frozen": choices("frozen", "int8", "nf4") if level >= 2 and not adapts else [config.frozen],
    }
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        if chosen.get("resident_share") and chosen["residency"] != "host":
            continue
        if placement_of(replace(config, **chosen)).streams and chosen["checkpointing"] != config.checkpointing:
            continue  # a streamed block is recomputed whatever is asked for
        changed = {name: value for name, value in chosen.items() if value != getattr(config, name)}
        for batch, accum in _splits(config):
            split = {} if batch == config.batch else {"batch": batch, "accum": accum}
            yield changed | split


def _splits(config: TrainConfig) -> Iterator[tuple[int, int]]:
    """The same sequences a step in smaller micro-batches."""
    batch, accum = config.batch, config.accum
    yield batch, accum
    while batch % 2 == 0:
        batch, accum = batch // 2, accum * 2
        yield batch, accum

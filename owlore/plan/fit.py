"""`owlore plan --fit 8GB`: the cheapest settings under which a run fits a device.

Settings that leave every bit as it is come first, then those that round differently, last those that change what is
trained against. Within such a level the least predicted seconds win, and of those the fewest changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from owlore.config import TrainConfig, as_typed
from owlore.plan.plan import Plan
from owlore.plan.planner import planner_of
from owlore.plan.traffic import Rates
from owlore.settings import placement_of, resolve

LEVELS = ("every bit stays as it is", "states and weights are rounded more coarsely", "frozen blocks are quantised")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Settings under which a run fits a device, or nearly does.

    Attributes:
        limit: bytes that the peak may take.
        changes: settings to give beside the user's own.
        level: index into `LEVELS`, what the changes cost.
        plan: the plan with these changes.
    """

    limit: int
    changes: dict[str, Any]
    level: int
    plan: Plan

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.plan.bytes["total"] <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """The changes and their cost as JSON."""
        return {"limit": self.limit, "fits": self.fits, "changes": self.changes, "options": as_typed(self.changes),
                "cost": LEVELS[self.level]}  # fmt: skip


def fit_from_config(
    config: TrainConfig,
    limit: int,
    notify: Callable[[str], None],
    rates: Rates = Rates(),  # noqa: B008 - frozen
) -> Fit:
    """Find the cheapest settings with which the peak is within a limit.

    What the user gave stays; only settings that were left open are changed (`--batch` may be split into `--accum`).

    Args:
        config: the settings.
        limit: bytes that the peak may take.
        notify: is given what the user should know, one line at a time.
        rates: bandwidth and speed of the device.

    Returns:
        The cheapest settings; where none is within the limit, those with the smallest peak.
    """
    config, strategy = resolve(config)
    planner = planner_of(config, strategy, notify, rates)
    fits: list[Fit] = []
    tried: list[dict[str, Any]] = []
    for level in range(len(LEVELS)):
        for changes in _candidates(config, level, adapts=strategy.adapts):
            if changes not in tried:
                tried.append(changes)
                plan = planner.plan(replace(config, **changes))
                fits.append(Fit(limit=limit, changes=changes, level=level, plan=plan))
        if found := [
            fit for fit in fits if fit.fits
        ]:  # of this level: one of an earlier level would have been returned
            return min(found, key=_cost)
    return min(fits, key=lambda fit: fit.plan.bytes["total"])


def _cost(fit: Fit) -> tuple[float, int, int]:
    """What is minimised among settings of a level: seconds, then the number of changes, then bytes."""
    return (round(fit.plan.traffic.step_seconds, 4), len(fit.changes), fit.plan.bytes["total"])


def _candidates(config: TrainConfig, level: int, *, adapts: bool) -> Iterator[dict[str, Any]]:
    """Settings to try at a level, as changes to the configuration."""
    wanted: dict[str, tuple[Any, ...]] = {"checkpointing": ("on",)}
    if not adapts:
        wanted |= {"residency": ("host",), "resident_share": (0.25, 0.5, 0.75), "offload_activations": (True,)}
    if level >= 1:
        wanted |= {"state_bits": (8,), "weights": ("bf16-sr",)}
    if level >= 2 and not adapts:
        wanted["frozen"] = ("int8", "nf4")
    options = {
        name: dict.fromkeys([getattr(config, name), *values])
        for name, values in wanted.items()
        if name not in config.fixed
    }
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        placement = placement_of(replace(config, **chosen))
        if placement.resident_share and placement.residency != "host":
            continue
        if placement.streams and chosen.get("checkpointing", config.checkpointing) != config.checkpointing:
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

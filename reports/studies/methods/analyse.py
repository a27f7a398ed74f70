"""From per-run JSON to figures: learning rates chosen, arms ranked, differences paired. Nothing is trained."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

Result = dict[str, Any]
FEWEST_SEEDS = 3
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is known of an arm at the learning rate that its validation loss chose.

    runs: by seed. at_edge: the chosen rate is the lowest or the highest of the sweep, so a better one may lie outside.
    """

    name: str
    lr: float
    at_edge: bool
    runs: dict[int, Result]
    validation: dict[float, float]

    def mean(self, *keys: str) -> float:
        return statistics.fmean(self.values(*keys).values())

    def values(self, *keys: str) -> dict[int, float]:
        """A figure of each seed's run, by its path in the result."""
        found = {}
        for seed, run in self.runs.items():
            value: Any = run
            for key in keys:
                value = value[key]
            found[seed] = float(value)
        return found

    @property
    def on_gpu(self) -> bool:
        return any("device" in run["peak_bytes"] for run in self.runs.values())

    @property
    def seconds(self) -> float:
        """Of a whole run with the scan that its table needed: the processor's, and on a GPU by the clock."""
        return self.mean("seconds", "call_wall" if self.on_gpu else "call_cpu") + self.mean("seconds", "scan_cpu")

    @property
    def peak_bytes(self) -> float:
        """How far the process grew, and on a GPU what was allocated there, the model's weights included."""
        return self.mean("peak_bytes", "device" if self.on_gpu else "resident_above_start")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Test loss of one arm less another's, seed by seed: negative is better."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def verdict(self) -> str:
        if math.isnan(self.low) or self.low <= 0 <= self.high:
            return "no difference that these seeds could show"
        return "better" if self.high < 0 else "worse"


def read_results(directory: Path) -> list[Result]:
    """Every cell that has a result, in the order of their names."""
    return [json.loads(file.read_text()) for file in sorted(directory.glob("*.json"))]


def choose(
    results: Sequence[Result], learning_rates: Sequence[float], tuning_seed: int
) -> dict[str, dict[float, float]]:
    """Validation loss of every arm at the learning rates that it was swept over; a run that failed is infinite.

    The chosen rate of an arm is the one with the lowest loss, once all rates are there (`chosen`).
    """
    losses: dict[str, dict[float, float]] = defaultdict(dict)
    for result in results:
        if result["seed"] == tuning_seed and result["lr"] in learning_rates:
            losses[result["arm"]][result["lr"]] = _loss(result)
    return dict(losses)


def chosen(losses: dict[float, float], learning_rates: Sequence[float]) -> float | None:
    """The learning rate of an arm, or None while its sweep is incomplete or where every run failed."""
    if set(losses) != set(learning_rates) or not math.isfinite(min(losses.values())):
        return None
    return min(losses, key=lambda rate: losses[rate])


def rank(
    results: Sequence[Result], learning_rates: Sequence[float], tuning_seed: int, fewest_seeds: int = FEWEST_SEEDS
) -> tuple[list[Arm], dict[str, str]]:
    """Arms by mean test loss, best first, and why the others are left out.

    Every ranked arm was swept over all learning rates of the study with the tuning seed and chose by validation loss;
    what is reported are its runs with other seeds at that rate, at least `fewest_seeds` of them, none failed.
    """
    arms, left_out = [], {}
    for name, losses in choose(results, learning_rates, tuning_seed).items():
        lr = chosen(losses, learning_rates)
        if missing := sorted(set(learning_rates) - set(losses)):
            left_out[name] = f"no run at learning rate {', '.join(f'{lr:g}' for lr in missing)}"
            continue
        if lr is None:
            left_out[name] = "runs failed at every learning rate"
            continue
        own = [r for r in results if (r["arm"], r["lr"]) == (name, lr) and r["seed"] != tuning_seed]
        runs = {r["seed"]: r for r in own if r["status"] == "finished"}
        if len(runs) < len(own):
            left_out[name] = f"{len(own) - len(runs)} of {len(own)} runs at its learning rate failed"
        elif len(runs) < fewest_seeds:
            left_out[name] = f"{len(runs)} seeds at its learning rate, {fewest_seeds} are needed"
        else:
            edge = lr in (min(learning_rates), max(learning_rates))
            runs = dict(sorted(runs.items()))
            arms.append(Arm(name=name, lr=lr, at_edge=edge, runs=runs, validation=losses))
    check_equal_tokens(arms)
    return sorted(arms, key=lambda arm: arm.mean("test_loss")), left_out


def _loss(result: Result) -> float:
    return float(result["validation_loss"]["after"]) if result["status"] == "finished" else math.inf


def check_equal_tokens(arms: Sequence[Arm]) -> None:
    """Raises: SystemExit when two arms saw other rows or another number of tokens with the same seed."""
    seen: dict[int, tuple[Any, str]] = {}
    for arm in arms:
        for seed, run in arm.runs.items():
            shown = (run["tokens"], run["steps"], json.dumps(run["rows_sha256"], sort_keys=True))
            first, name = seen.setdefault(seed, (shown, arm.name))
            if first != shown:
                raise SystemExit(f"seed {seed}: {arm.name} and {name} did not see the same tokens; nothing is ranked")


def difference(one: Arm, other: Arm) -> Difference:
    """Paired by seed, with the t interval of the mean."""
    a, b = one.values("test_loss"), other.values("test_loss")
    seeds = sorted(set(a) & set(b))
    gaps = [a[seed] - b[seed] for seed in seeds]
    if len(gaps) < 2:
        return Difference(mean=gaps[0] if gaps else math.nan, low=math.nan, high=math.nan, seeds=len(gaps))
    mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)) * error
    return Difference(mean=mean, low=mean - reach, high=mean + reach, seeds=len(gaps))


def mean_curve(arm: Arm, window: int) -> tuple[list[int], list[float]]:
    """Training loss a step, averaged over seeds and over the `window` steps before."""
    curves = [dict(map(tuple, run["curve"])) for run in arm.runs.values()]  # type: ignore[misc]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    raw = [statistics.fmean(curve[step] for curve in curves) for step in steps]
    return steps, [statistics.fmean(raw[max(0, i + 1 - window) : i + 1]) for i in range(len(raw))]


def not_dominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points that no other beats in both coordinates (lower is better)."""
    return [
        i for i, (x, y) in enumerate(points)
        if not any((a <= x and b <= y and (a, b) != (x, y)) for a, b in points)
    ]  # fmt: skip

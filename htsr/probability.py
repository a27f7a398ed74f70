"""From scores to how often a block is trained: score -> probability -> inclusion.

A block's `probability` is its share of the scores; its `inclusion` is the chance that a draw of gamma
different blocks holds it. The two are not proportional once gamma * probability exceeds 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from htsr.choices import DIRECTIONS, RULES, check_choice
from htsr.errors import BadInput, UsageError
from htsr.files import read_json, write_text

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "htsr-layer-table/1"
COLUMNS = ("index", "score", "probability", "inclusion")
SUM_TOLERANCE = 1e-6  # a table written by hand with seven digits is still one

Floats = NDArray[np.float64]


def scores_by_rule(rule: str, blocks: Any, direction: str = "heavy") -> Floats:
    """The score of each block under `rule`; larger means trained more often.

    Args:
        rule: `lod` the block's outlier share; `alpha` 1/alpha (`heavy`: a heavier tail is trained more) or
            alpha (`light`); `norm` the Frobenius norm of the block; `decrease` L..1; `increase` 1..L;
            `reverse` max + min - lod; `uniform` 1.
        blocks: a DataFrame or a mapping of equally long columns, one entry a block in order of depth; read are
            `block`, and `lod`, `alpha` or `log10_norm` (log10 of the block's summed squares) as the rule needs.
        direction: only `alpha` reads it.

    Raises:
        UsageError: an unknown rule or direction, or `light` with a rule that has no direction.
        BadInput: no blocks, or the column that the rule needs is missing or not finite for some block.
    """
    check_choice("rule", rule, RULES)
    check_choice("direction", direction, DIRECTIONS)
    if direction == "light" and rule != "alpha":
        raise UsageError(f"direction: got light with rule {rule}, expected rule alpha: no other rule has a direction")
    depth = len(blocks["block"])
    if depth == 0:
        raise BadInput("the scan has no blocks, expected at least one; scan a model that has a stack of blocks")
    match rule:
        case "uniform":
            return np.ones(depth)
        case "decrease":
            return np.arange(depth, 0, -1, dtype=np.float64)
        case "increase":
            return np.arange(1, depth + 1, dtype=np.float64)
        case "norm":
            return np.sqrt(10.0 ** _column(blocks, "log10_norm", rule))
        case "alpha":
            alpha = _column(blocks, "alpha", rule)
            return 1.0 / alpha if direction == "heavy" else alpha
        case "lod":
            return _column(blocks, "lod", rule)
        case _:
            lod = _column(blocks, "lod", rule)
            return lod.max() + lod.min() - lod


def probabilities(scores: ArrayLike, temperature: float = 1.0) -> Floats:
    """score^(1/temperature), normalised to sum 1. Equal shares when every score is 0.

    Raises:
        UsageError: a temperature that is not a positive number.
        BadInput: scores that are empty, negative or not finite.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise UsageError(f"temperature: got {temperature}, expected a number above 0 (1 leaves the scores as they are)")
    values = _scores(scores)
    if values.max() == 0:
        return np.full(len(values), 1.0 / len(values))
    powers = (values / values.max()) ** (1.0 / temperature)  # relative to the largest: never overflows
    return powers / powers.sum()


def inclusion(scores: ArrayLike, gamma: float, floor: float = 0.0) -> Floats:
    """Water-filling: pi = min(1, max(floor, c * score)) with c such that the sum is gamma.

    With fewer positive scores than gamma the positive ones get 1 and the others share equally what is missing
    (`shortfall` says so). A gamma above the number of blocks means all of them.

    Args:
        scores: non-negative, shape (L,); only their ratios matter, so probabilities serve as well.
        gamma: expected, and drawn, number of blocks a period.
        floor: lower bound on each inclusion, at most gamma / L.

    Raises:
        UsageError: gamma not above 0, or a floor outside [0, gamma / L].
        BadInput: scores that are empty, negative or not finite.

    Note: OwLore's own code draws without replacement from probability, which does not give these inclusions.
    """
    values = _scores(scores)
    depth = len(values)
    target = _target(gamma, floor, depth)
    positive = values > 0
    if positive.sum() + floor * (depth - positive.sum()) <= target:
        missing = target - positive.sum()
        return np.where(positive, 1.0, missing / max(1, depth - positive.sum()))
    scale = _water_level(values, target, floor)
    return np.clip(scale * values, floor, 1.0)


def shortfall(scores: ArrayLike, gamma: float, floor: float = 0.0) -> str:
    """One sentence when fewer scores than gamma are positive (zero blocks then share the rest), else ''."""
    values = _scores(scores)
    depth = len(values)
    target = _target(gamma, floor, depth)
    positive = int((values > 0).sum())
    if positive + floor * (depth - positive) >= target:
        return ""
    return (
        f"only {positive} of {depth} blocks have a positive score and gamma is {target:g}: "
        f"the other {depth - positive} share the missing {target - positive:g} equally"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTable:
    """How often each block is to be trained, with where that came from.

    Attributes:
        model: `id`, `revision`, `num_blocks`, `config_sha256`, `weights_sha256` of the scanned model.
        rule: `name` of the rule and its settings (temperature, floor, direction, tau ...); `note` when something
            about the table has to be said aloud.
        gamma: number of blocks in a draw.
        index, score, probability, inclusion: shape (L,), ordered by block.
    """

    model: dict[str, Any]
    rule: dict[str, Any]
    gamma: int
    index: NDArray[np.int64]
    score: Floats
    probability: Floats
    inclusion: Floats

    @classmethod
    def build(
        cls,
        scores: ArrayLike,
        gamma: int = 5,
        temperature: float = 1.0,
        floor: float = 0.0,
        *,
        rule: Mapping[str, Any] | str = "given",
        model: Mapping[str, Any] | None = None,
    ) -> LayerTable:
        """The table of `scores`; gamma is cut to the number of blocks, temperature and floor go into `rule`."""
        values = np.asarray(scores, dtype=np.float64)
        probability = probabilities(values, temperature)
        gamma = min(_whole_gamma(gamma), len(values))
        described = {"name": rule} if isinstance(rule, str) else dict(rule)
        described |= {"temperature": float(temperature), "floor": float(floor)}
        if note := shortfall(probability, gamma, floor):
            described["note"] = note
        identity = dict.fromkeys(("id", "revision", "num_blocks", "config_sha256", "weights_sha256"))
        return cls(
            model=identity | dict(model or {}) | {"num_blocks": len(values)},
            rule=described,
            gamma=gamma,
            index=np.arange(len(values)),
            score=values,
            probability=probability,
            inclusion=inclusion(probability, gamma, floor),
        )

    @classmethod
    def uniform(cls, num_blocks: int, gamma: int = 5) -> LayerTable:
        """Every block alike: what LISA and BAdam sample from."""
        return cls.build(np.ones(num_blocks), gamma, rule="uniform")

    @classmethod
    def load(cls, path: str | Path) -> LayerTable:
        """Read and check a table file, or the `table.json` of a scan directory.

        Raises:
            NotFound: no such file.
            BadInput: not a table of this schema, or one whose numbers contradict each other.
        """
        path = Path(path)
        path = path / "table.json" if path.is_dir() else path
        data = read_json(path, expected=f"a layer table ({SCHEMA})")
        try:
            return cls.from_dict(data)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, data: Any) -> LayerTable:
        """The table in a parsed JSON value; raises BadInput as `load` does."""
        return _parse(data)

    @property
    def num_blocks(self) -> int:
        return len(self.index)

    @property
    def note(self) -> str:
        """What has to be said aloud about this table, or ''."""
        return str(self.rule.get("note", ""))

    @property
    def frame(self) -> pd.DataFrame:
        """One row a block: index, score, probability, inclusion."""
        import pandas as pd

        return pd.DataFrame({name: getattr(self, name) for name in COLUMNS})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, numbers as plain ints and floats."""
        columns = [getattr(self, name).tolist() for name in COLUMNS]
        return {
            "schema": SCHEMA,
            "model": self.model,
            "rule": self.rule,
            "gamma": self.gamma,
            "blocks": [dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)],
        }

    def save(self, path: str | Path) -> Path:
        """Write the JSON form in one step; floats at full precision."""
        import json

        write_text(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return Path(path)


def _target(gamma: float, floor: float, depth: int) -> float:
    if not (math.isfinite(gamma) and gamma > 0):
        raise UsageError(f"gamma: got {gamma}, expected a number of blocks above 0")
    target = min(float(gamma), float(depth))
    if not 0 <= floor <= target / depth * (1 + 1e-12):
        limit = target / depth
        raise UsageError(f"floor: got {floor}, expected 0 to gamma / blocks = {limit:.6g}; lower it or raise gamma")
    return target


def _water_level(scores: Floats, target: float, floor: float) -> float:
    """The c with sum(clip(c * scores, floor, 1)) == target.

    The sum is piecewise linear in c with kinks where a block leaves the floor or reaches 1; between the two kinks
    around the target the free blocks are known and c follows in closed form.
    """
    positive = scores[scores > 0]
    kinks = np.sort(np.concatenate([1.0 / positive, floor / positive]))
    sums = np.clip(kinks[:, None] * scores[None, :], floor, 1.0).sum(axis=1)
    above = min(int(np.searchsorted(sums, target)), len(kinks) - 1)
    inside = 0.5 * (kinks[above] + (kinks[above - 1] if above else 0.0))
    full, free = inside * scores >= 1.0, (inside * scores > floor) & (inside * scores < 1.0)
    if not free.any():  # the target lies on a plateau or on the kink itself
        return float(kinks[above])
    settled = full.sum() + floor * (len(scores) - full.sum() - free.sum())
    return float((target - settled) / scores[free].sum())


def _scores(scores: ArrayLike) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise BadInput(f"scores: got shape {values.shape}, expected one number a block")
    if not np.isfinite(values).all() or (values < 0).any():
        bad = int(np.argmax(~np.isfinite(values) | (values < 0)))
        raise BadInput(f"scores: block {bad} has {values[bad]}, expected finite numbers of at least 0")
    if values.max() > 0:
        values = values / values.max()
        # Below the smallest normal number 1/score would overflow; such a share is never drawn anyway.
        values = np.where(values < np.finfo(np.float64).tiny, 0.0, values)
    return values


def _column(blocks: Mapping[str, Any], name: str, rule: str) -> Floats:
    hint = "scan with a calibration text" if name == "lod" else "choose another rule"
    if name not in blocks:
        raise BadInput(f"rule {rule}: the scan has no column {name}; {hint}")
    values = np.asarray(blocks[name], dtype=np.float64)
    if not np.isfinite(values).all():
        missing = np.asarray(blocks["block"])[~np.isfinite(values)].tolist()
        listed = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise BadInput(f"rule {rule}: {name} was not computed for block {listed}; {hint}")
    return values


def _whole_gamma(gamma: float) -> int:
    if not math.isfinite(gamma) or gamma != int(gamma) or gamma < 1:
        raise UsageError(f"gamma: got {gamma}, expected a whole number of blocks, at least 1")
    return int(gamma)


def _parse(data: Any) -> LayerTable:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        got = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise BadInput(f"got schema {got!r}, expected {SCHEMA!r}; make a table with `htsr table`")
    model, rule, gamma, rows = (data.get(key) for key in ("model", "rule", "gamma", "blocks"))
    if not isinstance(model, dict) or not isinstance(rule, dict):
        raise BadInput("got no `model` or no `rule` object, expected both; make a table with `htsr table`")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise BadInput("`blocks`: expected a list with one object a block")
    columns = {name: _numbers(rows, name) for name in COLUMNS}
    order = _check_blocks(columns["index"], model.get("num_blocks"))
    gamma = _check_gamma(gamma, len(rows))
    score, probability, inclusions = (columns[name][order] for name in COLUMNS[1:])
    _check_sum("probability", probability, 1.0)
    _check_sum("inclusion", inclusions, float(gamma))
    return LayerTable(
        model=model,
        rule=rule,
        gamma=gamma,
        index=np.arange(len(rows)),
        score=score,
        probability=probability,
        inclusion=inclusions,
    )


def _numbers(rows: list[dict[str, Any]], name: str) -> Floats:
    values = [row.get(name) for row in rows]
    for position, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
            raise BadInput(f"`blocks[{position}].{name}`: got {value!r}, expected a finite number of at least 0")
    return np.asarray(values, dtype=np.float64)


def _check_blocks(index: Floats, num_blocks: Any) -> NDArray[np.int64]:
    """The order that sorts `index`, once it is known to hold 0 .. num_blocks - 1 exactly once."""
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int):
        raise BadInput(f"`model.num_blocks`: got {num_blocks!r}, expected the number of blocks")
    counts: dict[float, int] = {}
    for value in index.tolist():
        counts[value] = counts.get(value, 0) + 1
    if twice := [value for value, count in counts.items() if count > 1]:
        raise BadInput(f"block {twice[0]:g} is listed {counts[twice[0]]} times, expected every block exactly once")
    if strange := [value for value in counts if value != int(value) or value >= num_blocks]:
        raise BadInput(f"block {strange[0]:g} is listed, expected indexes 0 to {num_blocks - 1} (num_blocks)")
    if len(counts) != num_blocks:
        missing = next(block for block in range(num_blocks) if block not in counts)
        raise BadInput(f"block {missing} is missing, expected every block 0 to {num_blocks - 1} exactly once")
    return np.argsort(index)


def _check_gamma(gamma: Any, depth: int) -> int:
    if isinstance(gamma, bool) or not isinstance(gamma, int) or not 1 <= gamma <= depth:
        raise BadInput(f"`gamma`: got {gamma!r}, expected a whole number from 1 to {depth}, the number of blocks")
    return gamma


def _check_sum(name: str, values: Floats, expected: float) -> None:
    if (values > 1 + SUM_TOLERANCE).any():
        block = int(np.argmax(values))
        raise BadInput(f"{name} of block {block} is {values[block]:g}, expected at most 1")
    total = math.fsum(values)
    if abs(total - expected) > SUM_TOLERANCE * max(1.0, expected):
        raise BadInput(f"{name} sums to {total:.9g}, expected {expected:g}; make the table again with `htsr table`")

"""From scores to how often a block is trained: score -> probability -> inclusion.

A block's `probability` is its share of the scores; its `inclusion` is the chance that a draw of gamma
different blocks holds it. The two are not proportional once gamma * probability exceeds 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from htsr.choices import DIRECTIONS, RULES, check_choice
from htsr.errors import BadInput, UsageError

Floats = NDArray[np.float64]


def scores_by_rule(rule: str, blocks: Any, direction: str = "heavy") -> Floats:
    """The score of each block under `rule`; larger means trained more often.

    Args:
        rule: `lod` the block's outlier share; `alpha` 1/alpha (`heavy`: a heavier tail is trained more) or alpha
            (`light`); `norm` the Frobenius norm of the block; `decrease` L..1; `increase` 1..L; `reverse` max + min -
            lod; `uniform` 1.
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
        case "reverse":
            lod = _column(blocks, "lod", rule)
            return lod.max() + lod.min() - lod
        case _:
            raise UsageError(f"rule: got {rule!r}, which has no score yet, expected another of {', '.join(RULES)}")


def probabilities(scores: ArrayLike, temperature: float = 1.0) -> Floats:
    """Turn scores into probabilities: score^(1/temperature), normalised to sum 1.

    Args:
        scores: at least 0, shape (L,); equal shares when every score is 0.
        temperature: above 0; above 1 it flattens the scores, below 1 it sharpens them.

    Returns:
        Shares in [0, 1], shape (L,).

    Raises:
        UsageError: the temperature is no positive number.
        BadInput: the scores are empty, negative or not finite.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise UsageError(f"temperature: got {temperature}, expected a number above 0 (1 leaves the scores as they are)")
    values = _scores(scores)
    if values.max() == 0:
        return np.full(len(values), 1.0 / len(values))
    powers = values ** (1.0 / temperature)  # the largest is 1: nothing overflows
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

    The sum is piecewise linear in c with kinks where a block leaves the floor or reaches 1. Between the two kinks
    around the target it is known which blocks are at neither bound, and c follows in closed form.
    """
    positive = scores[scores > 0]
    kinks = np.sort(np.concatenate([1.0 / positive, floor / positive]))
    sums = np.clip(kinks[:, None] * scores[None, :], floor, 1.0).sum(axis=1)
    above = min(int(np.searchsorted(sums, target)), len(kinks) - 1)
    inside = 0.5 * (kinks[above] + (kinks[above - 1] if above else 0.0))
    full, free = inside * scores >= 1.0, (inside * scores > floor) & (inside * scores < 1.0)
    if not free.any():  # the target lies on a plateau or on the kink itself
        return float(kinks[above])
    fixed = full.sum() + floor * (len(scores) - full.sum() - free.sum())
    return float((target - fixed) / scores[free].sum())


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

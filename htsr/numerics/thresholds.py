"""The fit at every possible xmin: how much alpha depends on where the tail begins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from htsr.numerics.powerlaw import SMALL_SAMPLE

WITHIN = 0.05  # of the best distance: thresholds that the data hardly tell apart
LEAST_TAIL = 10  # points; an exponent of fewer is mostly noise


@dataclass(frozen=True, kw_only=True)
class KsCurve:
    """The fit at every possible xmin, ascending; all arrays have shape (candidates,).

    Attributes:
        xmin: the eigenvalue where the tail begins.
        alpha: the exponent of that tail.
        ks_d: its Kolmogorov-Smirnov distance, in [0, 1].
        n: number of points in the tail.
    """

    xmin: np.ndarray
    alpha: np.ndarray
    ks_d: np.ndarray
    n: np.ndarray

    @property
    def near_best(self) -> np.ndarray:
        """Which candidates have a distance within 5 % of the smallest."""
        return self.ks_d <= (1 + WITHIN) * self.ks_d.min() if len(self.ks_d) else np.empty(0, dtype=bool)


def ks_curve(eigenvalues: np.ndarray) -> KsCurve:
    """Fit a power law at every eigenvalue but the largest, in O(N^2).

    Args:
        eigenvalues: positive, in any order, shape (N,).

    Returns:
        The fits; the smallest distance is that of `fit_power_law`, to rounding. Candidates without spread above them
        are left out, and below 20 points there are none.
    """
    log_x = np.log(np.sort(np.asarray(eigenvalues, dtype=np.float64)))
    points = len(log_x)
    rank = np.arange(points, dtype=np.float64)
    rows = []
    for i in range(points - 1 if points >= SMALL_SAMPLE else 0):
        n = points - i
        above = log_x[i:] - log_x[i]
        spread = float(above.sum())
        if spread <= n * 1e-12:
            continue
        slope = n / spread
        ks_d = np.abs(1 - np.exp(-slope * above) - rank[:n] / n).max()
        rows.append((np.exp(log_x[i]), 1 + slope, ks_d, n))
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return KsCurve(xmin=columns[0], alpha=columns[1], ks_d=columns[2], n=columns[3].astype(np.int64))


def alpha_range(curve: KsCurve) -> tuple[float, float]:
    """The smallest and the largest alpha over all xmin whose distance is within 5 % of the best; NaN without any."""
    near = curve.alpha[curve.near_best]
    return (float(near.min()), float(near.max())) if len(near) else (np.nan, np.nan)


def alpha_average(curve: KsCurve) -> float:
    """Average the exponents at all xmin with at least 10 points.

    The weights sqrt(n) exp(-2 n D^2) favour many points and a distance that chance explains. Each exponent is first
    freed of its bias, 1 + (alpha - 1)(n - 2) / n, which is exact for a power law above a given order statistic.

    Args:
        curve: the fits at every xmin.

    Returns:
        The average; NaN when no xmin has enough points.
    """
    enough = curve.n >= LEAST_TAIL
    if not enough.any():
        return np.nan
    n = curve.n[enough].astype(np.float64)
    unbiased = 1 + (curve.alpha[enough] - 1) * (n - 2) / n
    exponent = -2 * n * curve.ks_d[enough] ** 2
    weights = np.sqrt(n) * np.exp(exponent - exponent.max())
    return float(np.sum(weights * unbiased) / np.sum(weights))

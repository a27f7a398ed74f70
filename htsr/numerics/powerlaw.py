"""The exact Kolmogorov-Smirnov power-law fit, by branch and bound.

Every eigenvalue but the largest is a candidate xmin. For candidate i of the ascending x_0..x_{N-1}, n = N - i,
    alpha_i = 1 + n / (sum_{j>=i} ln x_j - n ln x_i)
    D_i     = max_j | 1 - (x_j / x_i)^(1 - alpha_i) - (j - i) / n |
and the fit is the first candidate with the smallest D. Trying all of them costs O(N^2). Here a lower bound of every
D_i comes from a few of its terms, candidates are tried in the order of their bounds, and the search ends when no
bound lies below the best D: the answer is the exhaustive one, bit for bit.

Reference: Clauset, Shalizi and Newman 2009; conventions of weightwatcher 0.7.7 (one-sided empirical distribution,
its own rule below 20 points).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

SMALL_SAMPLE = 20  # below this many points weightwatcher corrects the bias and wants tails of at least 8
SMALL_TAIL = 8
MIN_LOG_SUM = 1e-12
ALPHA_LIMIT = 1e8  # a tail whose values differ by rounding alone; no slope can be read from it
NUM_PROBES = 48
BOUNDED_AT_ONCE = 1024  # candidates; what is computed of them stays in the cache


class FitStatus(str, Enum):
    """How a fit ended; `sentence` says it in words. Only OK comes with numbers."""

    OK = "ok"
    TOO_FEW = "too_few"
    NOT_POSITIVE = "not_positive"
    NOT_FINITE = "not_finite"
    DEGENERATE = "degenerate"

    @property
    def sentence(self) -> str:
        """What the status means, in words; empty for OK."""
        return _SENTENCES[self]

    def __str__(self) -> str:
        return self.value


_SENTENCES = {
    FitStatus.OK: "",
    FitStatus.TOO_FEW: "fewer than two eigenvalues: there is no tail to fit",
    FitStatus.NOT_POSITIVE: "an eigenvalue is zero or negative: its logarithm does not exist",
    FitStatus.NOT_FINITE: "an eigenvalue is NaN or infinite",
    FitStatus.DEGENERATE: "the eigenvalues of the tail are equal up to rounding: no slope can be fitted",
}


@dataclass(frozen=True, kw_only=True)
class PowerLawFit:
    """The fit p(lambda) ~ lambda^-alpha for lambda >= xmin; every number is NaN (n_tail 0) unless `status` is OK.

    Attributes:
        alpha: the exponent, above 1.
        xmin: where the tail starts, in units of lambda.
        ks_d: the Kolmogorov-Smirnov distance between the tail and the fit, in [0, 1].
        sigma: the standard error (alpha - 1) / sqrt(number of points in the fit).
        n_tail: number of eigenvalues >= xmin.
        status: how the fit ended.
    """

    alpha: float = np.nan
    xmin: float = np.nan
    ks_d: float = np.nan
    sigma: float = np.nan
    n_tail: int = 0
    status: FitStatus = FitStatus.OK


def fit_power_law(eigenvalues: Sequence[float] | np.ndarray) -> PowerLawFit:
    """Fit a power law to the tail of a spectrum.

    Args:
        eigenvalues: positive numbers in any order and of any shape; at least 2. None is cut away here.

    Returns:
        The fit; `status` says why there is none, and nothing is raised.

    Note: the tail starts where the Kolmogorov-Smirnov distance is smallest (Clauset, Shalizi and Newman 2009). Below
        20 points short tails are skipped, as weightwatcher 0.7.7 does.
    """
    x = np.sort(np.asarray(eigenvalues, dtype=np.float64).ravel())
    if len(x) < 2:
        return PowerLawFit(status=FitStatus.TOO_FEW)
    if not np.isfinite(x).all():
        return PowerLawFit(status=FitStatus.NOT_FINITE)
    if x[0] <= 0:
        return PowerLawFit(status=FitStatus.NOT_POSITIVE)
    log_x = np.log(x)
    with np.errstate(divide="ignore", over="ignore"):
        best = _search_small(x, log_x) if len(x) < SMALL_SAMPLE else search(x, log_x)
    if best is None or not 1 < best[1] < ALPHA_LIMIT:
        return PowerLawFit(status=FitStatus.DEGENERATE)
    i, alpha, ks_d = best
    return PowerLawFit(
        alpha=float(alpha),
        xmin=float(x[i]),
        ks_d=float(ks_d),
        sigma=float((alpha - 1) / np.sqrt(len(x) - i)),
        n_tail=int(np.count_nonzero(x >= x[i])),
    )


def _distance(x: np.ndarray, i: int, alpha: float) -> float:
    """D_i: the largest gap between the fitted and the empirical distribution of the tail."""
    n = float(len(x) - i)
    return np.max(np.abs(1 - (x[i:] / x[i]) ** (-alpha + 1) - np.arange(n) / n))


def candidate(x: np.ndarray, log_x: np.ndarray, i: int) -> tuple[float, float]:
    """(alpha_i, D_i) with the reference's own order of summation; D is 1 where alpha is no exponent."""
    n = float(len(x) - i)
    alpha = 1 + n / (np.sum(log_x[i:]) - n * log_x[i])
    return alpha, _distance(x, i, alpha) if alpha > 1 else 1.0


def search(x: np.ndarray, log_x: np.ndarray) -> tuple[int, float, float]:
    """The first candidate with the smallest D: (i, alpha, D)."""
    bounds = lower_bounds(log_x)
    best_i, best_alpha, best_d = -1, np.nan, np.inf
    for i in np.argsort(bounds, kind="stable"):
        if bounds[i] > best_d:
            break
        alpha, ks_d = candidate(x, log_x, int(i))
        if ks_d < best_d or (ks_d == best_d and i < best_i):
            best_i, best_alpha, best_d = int(i), alpha, ks_d
    return best_i, best_alpha, best_d


def lower_bounds(log_x: np.ndarray) -> np.ndarray:
    """Bound the distance D_i of every candidate from below, rounding included.

    A maximum over some order statistics is at most the maximum over all of them. The suffix sums give alpha up to
    rounding; its effect on any term is at most (relative error of alpha - 1) / e, which is subtracted twice over.

    Args:
        log_x: natural logarithms of the eigenvalues, ascending, shape (N,).

    Returns:
        A number for each of the N - 1 candidates that D_i, as computed in floating point, cannot fall below.
    """
    N = len(log_x)
    index = np.arange(N - 1)
    n = (N - index).astype(np.float64)
    suffix = np.cumsum(log_x[::-1])[::-1][:-1]
    spread = suffix - n * log_x[:-1]  # = n / (alpha - 1)
    rounding = 4 * np.finfo(np.float64).eps * N * (np.cumsum(np.abs(log_x[::-1]))[::-1][:-1] + n * np.abs(log_x[:-1]))
    safe = spread > 100 * rounding
    slope = np.where(safe, n / np.where(safe, spread, 1.0), 0.0)  # alpha - 1
    bounds = np.zeros(N - 1)
    fractions = np.linspace(0.0, 1.0, NUM_PROBES)[:, None]
    for start in range(0, N - 1, BOUNDED_AT_ONCE):
        part = slice(start, min(start + BOUNDED_AT_ONCE, N - 1))
        offset = np.floor(fractions * (n[part] - 1)).astype(np.int64)
        gap = 1 - np.exp(slope[part] * (log_x[part] - log_x[index[part] + offset])) - offset / n[part]
        bounds[part] = np.max(np.abs(gap, out=gap), axis=0)
    # ratios x_j / x_i are rounded in the exact expression too, and a power of it multiplies that by alpha - 1
    slack = np.where(safe, rounding / np.where(safe, spread, 1.0), 0.0) + 1e-12 * (1 + slope)
    return np.where(safe, bounds - slack, 0.0)


def _search_small(x: np.ndarray, log_x: np.ndarray) -> tuple[int, float, float] | None:
    """The fit below 20 points: (n - 1) for n in the estimate, and no tails under 8 points or without spread.

    When no such tail is left the whole sample is the tail. None when that has no spread either.
    """
    N = len(x)
    starts = [i for i in range(N - 1) if N - i >= SMALL_TAIL and _log_sum(log_x, i) > MIN_LOG_SUM]
    if not starts and _log_sum(log_x, 0) > MIN_LOG_SUM:
        starts = [0]
    alphas = [1.0 + (N - i - 1.0) / _log_sum(log_x, i) for i in starts]
    fits = [(i, alpha, float(_distance(x, i, alpha))) for i, alpha in zip(starts, alphas, strict=True)]
    return min(fits, key=lambda fit: fit[2], default=None)


def _log_sum(log_x: np.ndarray, i: int) -> float:
    return np.sum(log_x[i:]) - float(len(log_x) - i) * log_x[i]

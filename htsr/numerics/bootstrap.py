"""The uncertainty of an exponent: a bootstrap that chooses xmin anew in every replica.

A replica draws as many eigenvalues with replacement as there are and fits them from scratch, so the interval holds
the uncertainty of xmin too, which sigma = (alpha - 1) / sqrt(n) leaves out. The interval is the percentile one: the
2.5 % and 97.5 % quantiles of the replicas' exponents.

Measured on exact Pareto samples with alpha from 1.5 to 8, the 95 % interval covers the truth at a rate of 0.925 to
0.995 from 100 points on and of 0.91 at 50 (reports/bench/nulls; sigma's 95 % cover 0.91). Eigenvalues of one matrix
repel each other and are not independent draws: on the bulk of a random matrix the interval is conservative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from htsr.numerics.powerlaw import SMALL_SAMPLE, FitStatus, fit_power_law
from htsr.numerics.replicas import fit_replicas

REPLICAS = 200
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class AlphaInterval:
    """A bootstrap interval of alpha; NaN and no replicas where there is no fit, or fewer than 20 eigenvalues.

    Attributes:
        low: lower end of the interval that covers the exponent at the stated level.
        high: upper end.
        replicas: the exponents of the replicas, shape (replicas,).
    """

    low: float
    high: float
    replicas: np.ndarray

    def share(self, low: float, high: float) -> float:
        """The share of the replicas, in [0, 1], with low <= alpha < high; NaN without replicas."""
        if len(self.replicas) == 0:
            return np.nan
        return float(np.mean((self.replicas >= low) & (self.replicas < high)))


def alpha_interval(
    eigenvalues: np.ndarray, rng: np.random.Generator, *, replicas: int = REPLICAS, level: float = LEVEL
) -> AlphaInterval:
    """Compute a bootstrap interval of alpha, in which every replica chooses its own xmin.

    Args:
        eigenvalues: positive, in any order, shape (n,).
        rng: draws the replicas.
        replicas: number of replicas, at least 1.
        level: the share of intervals that are to cover the exponent, in (0, 1).
    """
    fit = fit_power_law(eigenvalues)
    if fit.status is not FitStatus.OK or len(eigenvalues) < SMALL_SAMPLE:
        return AlphaInterval(low=np.nan, high=np.nan, replicas=np.empty(0))
    log_x = np.log(np.sort(np.asarray(eigenvalues, dtype=np.float64)))
    drawn = np.sort(rng.integers(0, len(log_x), (replicas, len(log_x)), dtype=np.int32), axis=1)
    alpha = fit_replicas(log_x[drawn]).alpha
    low, high = np.quantile(alpha, [(1 - level) / 2, (1 + level) / 2])
    return AlphaInterval(low=float(low), high=float(high), replicas=alpha)

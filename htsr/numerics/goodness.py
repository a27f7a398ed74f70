"""Whether a power law is a fair description of the tail: the semi-parametric bootstrap of Clauset et al.

A replica keeps the share of points above xmin. Those are drawn from the fitted power law, the others from the data
below xmin, and the whole is fitted from scratch. p is the share of replicas that lie at least as far from their own
fit as the data do from theirs: small means that a power law would rarely look this bad.

Reference: Clauset, Shalizi and Newman 2009, section 4.1 (there p < 0.1 rules the power law out).
"""

from __future__ import annotations

import numpy as np

from htsr.numerics.powerlaw import SMALL_SAMPLE, FitStatus, fit_power_law
from htsr.numerics.replicas import fit_replicas

REPLICAS = 199


def goodness_of_fit(eigenvalues: np.ndarray, rng: np.random.Generator, *, replicas: int = REPLICAS) -> float:
    """Test whether a power law describes the tail of a spectrum.

    Args:
        eigenvalues: positive, in any order, shape (n,).
        rng: draws the replicas.
        replicas: number of samples that are drawn and fitted, at least 1.

    Returns:
        p = (1 + replicas as far from their fit) / (1 + replicas), so that a true power law has p <= t at most at rate
        t. NaN where there is no fit, or fewer than 20 eigenvalues.
    """
    fit = fit_power_law(eigenvalues)
    if fit.status is not FitStatus.OK or len(eigenvalues) < SMALL_SAMPLE:
        return np.nan
    log_x = np.log(np.sort(np.asarray(eigenvalues, dtype=np.float64)))
    start = int(np.searchsorted(log_x, np.log(fit.xmin)))
    shape = (replicas, len(log_x))
    sample = np.log(fit.xmin) + rng.exponential(1 / (fit.alpha - 1), shape)
    if start > 0:
        below = log_x[rng.integers(0, start, shape)]
        sample = np.where(rng.random(shape) < start / len(log_x), below, sample)
    distances = fit_replicas(np.sort(sample, axis=1)).ks_d
    return float((1 + np.count_nonzero(distances >= fit.ks_d)) / (1 + replicas))

"""Numbers of a spectrum, with weightwatcher 0.7.7's meaning. lambda = sigma**2, ascending, everywhere.

A number that does not exist (the logarithm of a zero norm, the entropy of a matrix of rank 1) is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EPSILON = 1e-10  # weightwatcher adds it to every probability and to the rank
EIGENVALUE_CUT = 1e-5  # the fit sees eigenvalues above this absolute value, as in weightwatcher
RELATIVE_CUT = 1e-12  # of the largest: the cut for differences of weights, whose scale says how long they were trained


@dataclass(frozen=True, kw_only=True)
class SpectrumMetrics:
    """The numbers of a spectrum that need no fit, as weightwatcher defines them.

    Attributes:
        log10_norm: log10 of the squared Frobenius norm.
        log10_spectral_norm: log10 of the squared spectral norm.
        lambda_max: the largest eigenvalue.
        stable_rank: squared Frobenius norm over squared spectral norm.
        entropy: see `matrix_entropy`.
        alpha_hill: see the function of that name.
    """

    log10_norm: float
    log10_spectral_norm: float
    lambda_max: float
    stable_rank: float
    entropy: float
    alpha_hill: float


def spectrum_metrics(eigenvalues: np.ndarray, longer_side: int) -> SpectrumMetrics:
    """All metrics that need no fit, of the ascending eigenvalues of a matrix whose larger dimension is given."""
    norm, top = float(np.sum(eigenvalues)), float(np.max(eigenvalues))
    return SpectrumMetrics(
        log10_norm=log10(norm),
        log10_spectral_norm=log10(top),
        lambda_max=top,
        stable_rank=norm / top if top > 0 else np.nan,
        entropy=matrix_entropy(eigenvalues, longer_side),
        alpha_hill=alpha_hill(eigenvalues),
    )


def log10(value: float) -> float:
    """log10 of a positive number, NaN for any other."""
    return float(np.log10(value)) if value > 0 else np.nan


def alpha_hat(alpha: float, lambda_max: float) -> float:
    """alpha * log10(lambda_max): weightwatcher's `alpha_weighted`."""
    return alpha * log10(lambda_max)


def matrix_rank(eigenvalues: np.ndarray, longer_side: int) -> int:
    """The number of sigma > sigma_max * longer_side * eps."""
    sigma = np.sqrt(eigenvalues)
    return int(np.count_nonzero(sigma > np.max(sigma) * longer_side * np.finfo(np.float64).eps))


def matrix_entropy(eigenvalues: np.ndarray, longer_side: int) -> float:
    """-sum p ln p / ln rank with p = lambda / sum lambda: 1 for a flat spectrum; NaN below rank 2."""
    rank = matrix_rank(eigenvalues, longer_side)
    if rank < 2:
        return np.nan
    p = eigenvalues / np.sum(eigenvalues) + EPSILON
    return float(-np.sum(p * np.log(p)) / np.log(rank + EPSILON))


def alpha_hill(eigenvalues: np.ndarray) -> float:
    """Compute PL_Alpha_Hill, the Hill estimate from the upper half of the spectrum.

    With x ascending and i = int(n / 2):  alpha = 1 + (n - i) / (sum_{j>=i} ln x_j - (n - i) ln x_i).

    Args:
        eigenvalues: ascending, at least 0, shape (n,).

    Returns:
        The estimate; NaN when x_i is zero or the upper half has no spread.

    Reference: Zhou et al. 2023 (TempBalance).
    """
    n = len(eigenvalues)
    tail = eigenvalues[int(n / 2) :]
    if n < 2 or tail[0] <= 0:
        return np.nan
    spread = float(np.sum(np.log(tail)) - len(tail) * np.log(tail[0]))
    return 1 + len(tail) / spread if spread > 0 else np.nan


def effective_rank(eigenvalues: np.ndarray) -> float:
    """Compute exp of the entropy of the singular values' shares, sigma / sum sigma.

    Args:
        eigenvalues: lambda = sigma^2, in any order, shape (n,).

    Returns:
        A number from 1 to the rank; NaN when every eigenvalue is zero.

    Reference: Roy and Vetterli 2007.
    """
    sigma = np.sqrt(eigenvalues[eigenvalues > 0])
    if len(sigma) == 0:
        return np.nan
    shares = sigma / np.sum(sigma)
    return float(np.exp(-np.sum(shares * np.log(shares))))

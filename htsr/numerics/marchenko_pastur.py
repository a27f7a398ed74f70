"""The spectrum of pure noise: the Marchenko-Pastur law, its noise scale in a given spectrum, and what lies outside.

For W of N x M (N >= M) with independent entries of variance s^2, the eigenvalues of W^T W (no 1/N) fill
    s^2 (sqrt N - sqrt M)^2  to  s^2 (sqrt N + sqrt M)^2,
and the largest one lies around that upper edge with the scale
    s^2 (sqrt N + sqrt M) (1 / sqrt N + 1 / sqrt M)^(1/3),
distributed by Tracy-Widom's law of index 1. In the two formulas of the edge and its scale N and M are N - 1/2 and
M - 1/2, which is correct to the next order. References: Marchenko and Pastur 1967; Johnstone 2001; Ma 2012.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from htsr.numerics.tracy_widom import QUANTILE_95, tracy_widom_survival

TRIM_LOW, TRIM_HIGH = 0.10, 0.75  # quantiles that set the noise scale: neither the spikes nor the near-zero values
GRID = 4096


@dataclass(frozen=True, kw_only=True)
class NoiseFit:
    """The noise in a spectrum and what stands out of it.

    Attributes:
        sigma: standard deviation s of one entry of the noise, in units of the weights.
        edge: upper end of the noise's bulk, in units of lambda.
        num_spikes: number of eigenvalues beyond the edge by more than 95 % of noise matrices ever are.
        p_edge: the chance, by the Tracy-Widom law, that noise of this scale has a largest eigenvalue as large, in
            [0, 1]; NaN for s = 0.
    """

    sigma: float
    edge: float
    num_spikes: int
    p_edge: float


def fit_noise(eigenvalues: np.ndarray, rows: int, cols: int) -> NoiseFit:
    """Fit Marchenko-Pastur noise to a spectrum by trimmed quantiles.

    s^2 is the least-squares slope of the 10 % to 75 % quantiles of the spectrum against those of noise of variance 1,
    so that no spike can pull at it, whatever its size.

    Args:
        eigenvalues: ascending, shape (min(rows, cols),), zeros included.
        rows: number of rows of the matrix.
        cols: number of columns.
    """
    count = len(eigenvalues)
    levels = (np.arange(count) + 0.5) / count
    kept = (levels >= TRIM_LOW) & (levels <= TRIM_HIGH)
    unit = noise_quantiles(levels[kept], rows, cols)
    variance = float(np.sum(unit * eigenvalues[kept]) / np.sum(unit**2)) if kept.any() else np.nan
    edge, scale = edge_and_scale(rows, cols)
    threshold = variance * (edge + QUANTILE_95 * scale)
    return NoiseFit(
        sigma=float(np.sqrt(variance)),
        edge=variance * edge,
        num_spikes=int(np.count_nonzero(eigenvalues > threshold)),
        p_edge=noise_survival(float(eigenvalues[-1]), variance, rows, cols),
    )


def noise_survival(lambda_max: float, variance: float, rows: int, cols: int) -> float:
    """P(largest eigenvalue >= lambda_max) of noise with that variance of an entry; NaN for no variance."""
    if not variance > 0:
        return np.nan
    edge, scale = edge_and_scale(rows, cols)
    return tracy_widom_survival((lambda_max / variance - edge) / scale)


def edge_and_scale(rows: int, cols: int) -> tuple[float, float]:
    """Where the largest eigenvalue of noise of scale 1 lies, and the unit of its fluctuation."""
    a, b = np.sqrt(rows - 0.5), np.sqrt(cols - 0.5)
    return float((a + b) ** 2), float((a + b) * (1 / a + 1 / b) ** (1 / 3))


def noise_quantiles(levels: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Quantiles of the Marchenko-Pastur law for entries of variance 1, in units of lambda; levels in (0, 1)."""
    x, cumulative = _distribution(max(rows, cols), min(rows, cols))
    return np.interp(levels, cumulative, x)


def noise_density(x: np.ndarray, sigma: float, rows: int, cols: int) -> np.ndarray:
    """The Marchenko-Pastur density at the eigenvalues x (0 outside its bulk), for entries of deviation sigma."""
    longer, side = max(rows, cols), min(rows, cols)
    scaled = np.asarray(x) / sigma**2
    low, high = (np.sqrt(longer) - np.sqrt(side)) ** 2, (np.sqrt(longer) + np.sqrt(side)) ** 2
    inside = (scaled > low) & (scaled < high)
    safe = np.where(inside, scaled, high)
    density = np.sqrt(np.maximum((high - safe) * (safe - low), 0)) / (2 * np.pi * side * safe)
    return np.where(inside, density, 0.0) / sigma**2


@lru_cache(maxsize=64)
def _distribution(longer: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The cumulative law on a grid, by x = m - r cos t, in which the density's square roots are smooth."""
    middle, radius = float(longer + side), 2 * np.sqrt(float(longer) * side)
    t = np.linspace(0, np.pi, GRID)
    x = middle - radius * np.cos(t)
    safe = np.where(x > 0, x, 1.0)
    density = np.where(x > 0, radius**2 * np.sin(t) ** 2 / (2 * np.pi * side * safe), radius / (np.pi * side))
    steps = (density[1:] + density[:-1]) / 2
    cumulative = np.concatenate([[0.0], np.cumsum(steps)])
    return x, cumulative / cumulative[-1]

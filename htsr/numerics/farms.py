"""FARMS: the Hill exponent of many submatrices of one fixed shape, so that the aspect ratio of a layer drops out.

Windows of 100 rows and 200 columns at ten evenly spread positions along each side of the stored (out x in) matrix, all
their eigenvalues pooled, those above 1e-5 kept, then PL_Alpha_Hill. A matrix too small for such a window gets
windows of the same proportion that fit. Reference: Hu et al. 2025, arXiv 2506.06280.
"""

from __future__ import annotations

import numpy as np

from htsr.numerics.metrics import EIGENVALUE_CUT, alpha_hill

WINDOW_ROWS = 100
ASPECT = 2
PLACES = 10
LEAST_ROWS = 8


def alpha_farms(W: np.ndarray, cut: float = EIGENVALUE_CUT) -> float:
    """The exponent of the eigenvalues above `cut`; W is (out, in), any float dtype. NaN where no 8 x 16 window fits."""
    rows, cols = W.shape
    height = min(WINDOW_ROWS, rows, cols // ASPECT)
    if height < LEAST_ROWS:
        return np.nan
    found = [
        _window_eigenvalues(np.asarray(W[r : r + height, c : c + ASPECT * height], dtype=np.float64))
        for r in window_starts(rows, height)
        for c in window_starts(cols, ASPECT * height)
    ]
    values = np.sort(np.concatenate(found))
    return alpha_hill(values[values > cut])


def window_starts(side: int, window: int) -> range:
    """Where windows start: at most ten, a fixed step apart, the first at 0."""
    step = max(1, (side - window) // (PLACES - 1))
    return range(0, min(PLACES, (side - window) // step + 1) * step, step)


def _window_eigenvalues(window: np.ndarray) -> np.ndarray:
    return np.maximum(np.linalg.eigvalsh(window @ window.T), 0.0)

"""Whether a square matrix has full rank, by one LU factorisation.

The Gram matrix squares the condition number, so its eigenvalues cannot tell a small singular value from zero.
The matrix itself can: after scaling rows and columns by powers of two, the smallest singular value of L U is far
above what the factorisation got wrong, or the question stays open.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from htsr.numerics.spectrum import as_array

STEPS = 6  # of inverse iteration
SAFETY = 0.1  # singular matrices of side 1500 have 0.002 and less in its place, and AGREEMENT 50 and more
AGREEMENT = 4.0
PROBES = 4
CHUNK = 256  # rows converted to float64 at a time


def has_full_rank(A: Any, dtype: type = np.float32) -> bool:
    """Whether a square matrix clearly has full numerical rank.

    A' is A with rows and columns scaled by powers of two, and x the right singular vector of the smallest singular
    value s of E + A' = L U, by inverse iteration. Were A' singular with kernel vector z, s would be one projection of E
    z, about |E z| / sqrt(side), and |A' x| about |E x|, sqrt(side) times s. So full rank means: s >= SAFETY |E g| / |g|
    for random g (the rounding of this very check overstates that), and |A' x| in float64 is s up to a factor AGREEMENT.

    Args:
        A: shape (side, side), an array or tensor of any float dtype.
        dtype: np.float32 or np.float64, in which the factorisation runs.

    Returns:
        False when the matrix lacks rank, or when full rank cannot be shown.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what is singular up to rounding overflows on the way
        return _has_full_rank(as_array(A, dtype))


def _has_full_rank(A: np.ndarray) -> bool:
    from scipy.linalg import get_lapack_funcs

    getrf, getrs = get_lapack_funcs(("getrf", "getrs"), (A,))
    scaled_A = scaled(A)
    if scaled_A is None:
        return False
    lu, pivots, info = getrf(scaled_A)
    if info != 0 or not np.isfinite(lu).all():
        return False
    probes = np.random.default_rng(0).standard_normal((len(A), PROBES)).astype(A.dtype)
    wrong = np.linalg.norm(_apply(lu, pivots, probes) - scaled_A @ probes) / np.linalg.norm(probes)
    x = probes[:, :1] / np.linalg.norm(probes[:, 0])
    smallest = 0.0
    for _ in range(STEPS):  # of (A^T A)^-1
        y = getrs(lu, pivots, x, trans=1)[0]
        z = getrs(lu, pivots, y, trans=0)[0]
        size = np.linalg.norm(z)
        if not np.isfinite(size) or size == 0:
            return False
        smallest, x = float(np.linalg.norm(y) / size), z / size
    chunks = (scaled_A[i : i + CHUNK].astype(np.float64) @ x for i in range(0, len(A), CHUNK))
    seen = float(np.sqrt(sum(float(np.sum(part**2)) for part in chunks)))
    return bool(smallest > SAFETY * wrong and smallest < AGREEMENT * seen < AGREEMENT**2 * smallest)


def scaled(A: np.ndarray) -> np.ndarray | None:
    """Rows, then columns, brought to a largest entry in [1, 2) by powers of two; None when one is empty."""
    A = np.array(A)
    with np.errstate(invalid="ignore"):
        for axis in (1, 0):
            largest = np.maximum(A.max(axis=axis, keepdims=True), -A.min(axis=axis, keepdims=True))
            if not (np.isfinite(largest).all() and (largest > 0).all()):
                return None
            factor = np.ldexp(A.dtype.type(1), np.clip(1 - np.frexp(largest)[1], -120, 120))
            A *= factor
    return A


def _apply(lu: np.ndarray, pivots: np.ndarray, X: np.ndarray) -> np.ndarray:
    """P L U X."""
    from scipy.linalg import get_blas_funcs, get_lapack_funcs

    trmm, laswp = get_blas_funcs("trmm", (lu,)), get_lapack_funcs("laswp", (lu,))
    return laswp(trmm(1.0, lu, trmm(1.0, lu, X), lower=1, diag=1), pivots, inc=-1)

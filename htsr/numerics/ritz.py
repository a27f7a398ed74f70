"""Residuals and Rayleigh-Ritz in float64: how good vectors are, and the eigenvalues of W^T W within their span.

A vector that is off by an angle t costs its eigenvalue about t^2 relative: float32 vectors give values far beyond
float32. Only the span matters; the columns of V need neither unit length nor orthogonality.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from htsr.numerics.spectrum import in_float64


def ritz_values(slices: Iterable[Any], V: np.ndarray) -> np.ndarray:
    """Compute the Ritz values of W^T W on the span of V, in float64.

    Args:
        slices: the slices of W, each with `side` columns.
        V: shape (side, k); its columns need neither unit length nor orthogonality.

    Returns:
        k values, ascending; none is above the eigenvalue of the same rank from the top.

    Raises:
        LinAlgError: the columns of V are linearly dependent up to rounding.
    """
    from scipy.linalg import eigh
    from scipy.linalg.blas import dsyrk

    Q = np.asfortranarray(V, dtype=np.float64)
    k = Q.shape[1]
    overlap = dsyrk(1.0, Q, trans=1, lower=1)
    K: np.ndarray = np.zeros((k, k), order="F")
    for B in in_float64(slices):
        Y = B @ Q
        K = dsyrk(1.0, Y.T, trans=0, beta=1.0, c=K, lower=1, overwrite_c=1)
    return eigh(K, overlap, eigvals_only=True, lower=True, overwrite_a=True, overwrite_b=True, check_finite=False)


def residual_norms(slices: Iterable[Any], V: np.ndarray, values: np.ndarray) -> np.ndarray:
    """|W^T W v_j - values_j v_j| / |v_j| for every column of V: an eigenvalue lies within that distance of values_j."""
    Q = np.asarray(V, dtype=np.float64)
    AQ = np.zeros_like(Q)
    for B in in_float64(slices):
        AQ += B.T @ (B @ Q)
    return np.linalg.norm(AQ - Q * values, axis=0) / np.linalg.norm(Q, axis=0)

"""The spectrum of a product B A of thin matrices, without forming it."""

from __future__ import annotations

import numpy as np

from htsr.numerics.spectrum import require_finite


def product_eigenvalues(B: np.ndarray, A: np.ndarray) -> np.ndarray:
    """Compute the eigenvalues lambda = sigma^2 of a product B A without forming it.

    With B = Q_b R_b and A^T = Q_a R_a, B A = Q_b (R_b R_a^T) Q_a^T has the singular values of an r x r matrix. That
    costs O((n + m) r^2) instead of O(n^2 m), and the small values are as accurate as the factors.

    Args:
        B: shape (n, r).
        A: shape (r, m).

    Returns:
        min(n, m) values, ascending, float64; at most r of them are not zero.

    Raises:
        BadInput: a factor holds NaN or infinity.
    """
    require_finite(B)
    require_finite(A)
    side, rank = min(len(B), A.shape[1]), B.shape[1]
    R_b, R_a = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (B, A.T))
    core = R_b @ R_a.T
    sigma = np.linalg.svd(core, compute_uv=False)[:side]
    noise = max(len(B), A.shape[1], rank) * np.finfo(np.float64).eps * (sigma[0] if len(sigma) else 0.0)
    values = np.zeros(side)
    values[side - len(sigma) :] = np.sort(np.where(sigma > noise, sigma, 0.0) ** 2)
    return values

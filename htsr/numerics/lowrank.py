"""The spectrum of a product B A of thin matrices, without forming it."""

from __future__ import annotations

import numpy as np

from htsr.numerics.spectrum import require_finite


def product_eigenvalues(B: np.ndarray, A: np.ndarray) -> np.ndarray:
    """Ascending lambda = sigma**2 of B A for B of (n, r) and A of (r, m); min(n, m) values, zeros but for at most r.

    With B = Q_b R_b and A^T = Q_a R_a:  B A = Q_b (R_b R_a^T) Q_a^T, so the singular values are those of an r x r
    matrix: O((n + m) r^2) instead of O(n^2 m), and the small ones are as accurate as the factors.
    Raises BadInput when a factor holds a NaN or an infinity.
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

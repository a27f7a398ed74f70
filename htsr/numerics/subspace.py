"""Leading singular vectors of a matrix that is read in blocks, and how far two subspaces are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from htsr.numerics.spectrum import gram, require_finite

Slices = Callable[[], Iterable[np.ndarray]]  # the matrix once more, in slices of `side` columns


def leading_vectors(slices: Slices, side: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the spaces of the largest singular values of a tall matrix that is read in slices.

    Args:
        slices: returns the slices of the matrix W from the start, each with `side` columns; it is read twice.
        side: the shorter side.
        rank: number of singular values, at least 1.

    Returns:
        U (longer side, k) and V (side, k), orthonormal, float64; k is `rank`, or the numerical rank where that is
        smaller. V are eigenvectors of W^T W and U spans W V. Memory is O(side^2 + longer side * k).

    Raises:
        BadInput: the matrix holds NaN or infinity.
    """
    from scipy.linalg import eigh

    G = gram(slices(), side)
    require_finite(G)
    first = max(side - rank, 0)
    values, V = eigh(G, subset_by_index=[first, side - 1], overwrite_a=True, check_finite=False)
    kept = values > side * np.finfo(np.float64).eps * max(values[-1], 0.0)
    V = V[:, kept]
    return np.linalg.qr(np.concatenate([np.asarray(block, np.float64) @ V for block in slices()]))[0], V


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Compute how far two subspaces are the same: ||A^T B||_F^2 / k.

    Args:
        first: an orthonormal basis A, shape (n, k_a).
        second: an orthonormal basis B, shape (n, k_b); k is the smaller of k_a and k_b.

    Returns:
        1 when the smaller space lies in the other, 0 when they are orthogonal, max(k_a, k_b) / n on average for random
        spaces; NaN for an empty space.
    """
    k = min(first.shape[1], second.shape[1])
    return min(float(np.sum((first.T @ second) ** 2)) / k, 1.0) if k else float("nan")

"""Leading singular vectors of a matrix that is read in blocks, and how far two subspaces are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from htsr.numerics.spectrum import gram, require_finite

Slices = Callable[[], Iterable[np.ndarray]]  # the matrix once more, in slices of `side` columns


def leading_vectors(slices: Slices, side: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal bases of the spaces of the `rank` largest singular values of a tall matrix W of `side` columns.

    Returns (U, V): U (longer side, k) and V (side, k), k = rank or the numerical rank where that is smaller, float64.
    V are eigenvectors of W^T W; U spans W V. Memory is O(side^2 + longer * k); the matrix is read twice.
    Raises BadInput for NaN or infinite entries.
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
    """||A^T B||_F^2 / k of two orthonormal bases (n, k_a) and (n, k_b), k the smaller; in [0, 1].

    1 when the smaller space lies in the other, 0 when they are orthogonal; max(k_a, k_b) / n on average for random
    spaces. NaN for an empty space.
    """
    k = min(first.shape[1], second.shape[1])
    return min(float(np.sum((first.T @ second) ** 2)) / k, 1.0) if k else float("nan")

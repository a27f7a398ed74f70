"""The smallest singular values of a matrix, far below what its float32 Gram matrix can see, and how many are zero.

A Gram matrix squares the condition number: its eigenvalues within rounding of zero say nothing. Their eigenvectors do.
Let V be q orthonormal columns near the eigenvectors of the q smallest values of W^T W, turned so that V^T W^T W V is
diagonal; sigma_i its roots, that is, the singular values of W V (which no squaring has spoilt), and
R = W^T W V - V diag(sigma^2). By interlacing the i-th singular value of W is at most sigma_i. By how little it is less:

    |W x|^2  >=  a^T (diag(sigma^2) - 2 R^T R / rest) a + rest / 2 |z|^2       for every x = V a + z, V^T z = 0,

`rest` a lower bound of |W z|^2 / |z|^2. So where sum_i |R_i|^2 / sigma_i^2 <= rest / 4 over the sigma_i that are not
zero, none of them is below sigma_i / sqrt(2). Each correction V - (G + shift)^-1 R, solved with the float32
decomposition of G, brings R_i down by about the ratio of float32's error to `rest`.

`rest`: on the complement of the first vectors V_0 the decomposed G is at least its next value, and W^T W at least
`following`, that value less its radius. With s the sine of the angle between V and V_0 and tau = |W V_0|, every z
across V has |W z| >= sqrt(following (1 - s^2)) - tau s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from htsr.numerics.backend import Reduced
from htsr.numerics.spectrum import as_array, in_float64

SEPARATION = 4.0  # of the first value without a vector, in radii of the rough values
LARGEST_SHARE = 1 / 8  # of all vectors; with more of them float64 throughout is cheaper
CORRECTIONS = 16  # a value that is exactly zero takes about six
CLEAR = 2.0  # a singular value is above the limit of the rank, or below it, by this factor

Solve = Callable[[np.ndarray, float], np.ndarray]  # (R, shift) -> (G + shift)^-1 R


@dataclass(frozen=True, kw_only=True)
class SmallEnd:
    """The smallest eigenvalues of W^T W.

    Attributes:
        values: ascending lambda = sigma^2, 0 where sigma does not count in the numerical rank.
        products: how often q columns were multiplied by W and by its transpose.
    """

    values: np.ndarray
    products: int


def depth(rough: np.ndarray, radius: np.ndarray) -> int:
    """How many vectors to take, so that all further values are far above their radius; 0 where they are too many."""
    unclear = np.flatnonzero(rough <= SEPARATION * radius)
    q = int(unclear[-1]) + 1 if len(unclear) else 0
    return q if q < LARGEST_SHARE * len(rough) else 0


def small_end(
    read: Callable[[], Iterable[Any]], V: np.ndarray, solve: Solve, *, following: float, shift: float, limit: float
) -> SmallEnd | None:
    """Compute the smallest eigenvalues from the matrix itself, starting from approximate eigenvectors.

    Args:
        read: returns the slices of the matrix W from the start, each with `side` columns.
        V: eigenvectors of the q smallest values of the float32 Gram matrix G, shape (side, q).
        solve: (R, shift) -> (G + shift)^-1 R.
        following: the next eigenvalue of G less its radius, a lower bound for the complement of V.
        shift: makes G positive definite; about the error of G.
        limit: the largest singular value that counts as zero.

    Returns:
        The values that belong to the columns of V; None where it cannot be told how many of them are zero.
    """
    first = V = np.linalg.qr(np.asarray(V, np.float64))[0]
    last_least, last_share, tau = np.inf, np.inf, 0.0
    for products in range(1, CORRECTIONS + 1):
        sigma, V, R = _ritz(read(), V)
        tau = tau or float(sigma[-1])
        rest = _rest(following, tau, float(np.linalg.norm(first - V @ (V.T @ first), 2)))
        if rest <= 0:
            return None
        zero = int(np.count_nonzero(sigma <= limit / CLEAR))
        least = float(sigma[zero]) if zero < len(sigma) else np.inf
        share = float(np.sum(np.sum(R[:, zero:] ** 2, axis=0) / sigma[zero:] ** 2)) / rest
        if share <= 1 / 4 and least > CLEAR * limit:
            return SmallEnd(values=np.where(sigma <= limit / CLEAR, 0.0, sigma**2), products=products)
        if share > last_share / 2 and least > last_least * 0.7:
            return None
        last_least, last_share = least, share
        X = solve(R, shift)
        if not np.isfinite(X).all():
            return None
        V = np.linalg.qr(V - (X - V @ (V.T @ X)))[0]
    return None


def noise_resolved(
    read: Callable[[], Iterable[Any]],
    longer: int,
    reduced: Reduced,
    rough: np.ndarray,
    radius: np.ndarray,
    scale: float = 1.0,
) -> tuple[np.ndarray | None, float]:
    """Find the eigenvalues that may be noise of the Gram matrix from the matrix itself.

    Args:
        read: returns the slices of the matrix W from the start.
        longer: the longer side of W.
        reduced: the decomposition of scale^2 W^T W.
        rough: its eigenvalues over scale^2, ascending, shape (side,).
        radius: how far each rough value may be off, shape (side,).
        scale: a power of two.

    Returns:
        The smallest eigenvalues, all that may be noise among them (None where that fails), and the floating-point
        operations that it took.
    """
    n, q = len(rough), depth(rough, radius)
    if not q:
        return None, 0.0
    found = small_end(
        read,
        as_array(reduced.vectors(np.arange(q))),
        lambda R, shift: reduced.solve(R, shift * scale**2) * scale**2,
        following=float(rough[q] - radius[q]),
        shift=max(float(radius[0]) / 2, -2 * float(rough[0])),
        limit=float(np.sqrt(rough[-1])) * longer * float(np.finfo(np.float64).eps),
    )
    flops = 4.0 * n * longer * q
    return (None, flops) if found is None else (found.values, flops * found.products)


def _rest(following: float, tau: float, sine: float) -> float:
    """A lower bound of |W z|^2 across V, 0 where there is none."""
    if not (following > 0 and sine < 1):
        return 0.0
    return float(max(np.sqrt(following * (1 - sine**2)) - tau * sine, 0.0) ** 2)


def _ritz(slices: Iterable[Any], V: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ascending singular values of W V, V turned to their vectors, and the residuals W^T W v - sigma^2 v."""
    GV, triangles = np.zeros_like(V), []
    for B in in_float64(slices):
        Y = B @ V
        GV += B.T @ Y
        triangles.append(np.linalg.qr(Y, mode="r"))
    # W V has the singular values of its slices' triangles, one below the other
    _, sigma, turn = np.linalg.svd(np.concatenate(triangles))
    sigma, turn = sigma[::-1], turn[::-1].T
    V = V @ turn
    R = GV @ turn - V * sigma**2
    return sigma, V, R - V @ (V.T @ R)

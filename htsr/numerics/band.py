"""A large symmetric matrix reduced to a band first, and the band to a tridiagonal matrix.

The direct reduction (`tridiagonal`) multiplies the whole rest of the matrix by one vector at a time, so that half of it
runs at the speed of memory. Here a panel of `WIDTH` columns is cleared by a block reflector I - V T V^T, and the rest
changes by V X^T + X V^T: all of 4/3 n^3 are products of matrices. The second stage costs 6 n^2 WIDTH.

    with P = R + (rows below): V, T from the QR factors of the panel;  Y = A V T;  X = Y - V (T^T V^T Y) / 2
    (I - V T V^T)^T A (I - V T V^T) = A - V X^T - X V^T

Reference: Bischof, Lang and Sun 2000 (successive band reduction); Dongarra, Hammarling and Sorensen 1989.
"""

from __future__ import annotations

import numpy as np

from htsr.numerics.fortran import call, integers, lead

WIDTH = 48


def to_band(A: np.ndarray, width: int = WIDTH) -> list[np.ndarray]:
    """Overwrite the lower triangle of A by its band and, below the band, by the reflectors that made it.

    Args:
        A: symmetric, shape (n, n), float32 or float64, in Fortran order; only its lower triangle is read.
        width: number of subdiagonals that the band keeps, at least 1.

    Returns:
        The triangles T of the block reflectors I - V T V^T; the k-th acts on the rows from (k + 1) * width on.
    """
    triangles = []
    tau, work, info = np.empty(width, A.dtype), np.empty(64 * width, A.dtype), integers(1)
    for j in range(0, len(A) - width - 1, width):
        rest = A[j + width :, j + width :]
        panel = A[j + width :, j : j + width]
        m, k = len(rest), min(len(rest), width)
        call("geqrf", A.dtype, m, width, panel, lead(A), tau, work, len(work), info)
        V = reflectors(panel)
        T: np.ndarray = np.zeros((k, k), A.dtype, order="F")
        call("larft", A.dtype, b"F", b"C", m, k, V, m, tau, T, k)
        Y: np.ndarray = np.empty((m, k), A.dtype, order="F")
        call("symm", A.dtype, b"L", b"L", m, k, 1.0, rest, lead(A), V, m, 0.0, Y, m)
        Y = Y @ T
        X = np.asfortranarray(Y - V @ (T.T @ (V.T @ Y) / 2))
        call("syr2k", A.dtype, b"L", b"N", m, k, -1.0, V, m, X, m, 1.0, rest, lead(A))
        triangles.append(T)
    return triangles


def reflectors(panel: np.ndarray) -> np.ndarray:
    """V of a factored panel: unit lower trapezoidal, in Fortran order."""
    k = min(panel.shape)
    V = np.asfortranarray(np.tril(panel[:, :k], -1))
    V[np.arange(k), np.arange(k)] = 1
    return V


def band_storage(A: np.ndarray, width: int = WIDTH) -> np.ndarray:
    """The band of A's lower triangle as LAPACK stores it: (width + 1, n), entry (i, j) in row i - j of column j."""
    n = len(A)
    band: np.ndarray = np.zeros((width + 1, n), A.dtype, order="F")
    for offset in range(min(width + 1, n)):
        band[offset, : n - offset] = np.diagonal(A, -offset)
    return band


def band_to_tridiagonal(band: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Diagonal and subdiagonal of a tridiagonal matrix with the eigenvalues of the band, which is overwritten."""
    rows, n = band.shape
    d, e, work, Q = (np.empty(size, band.dtype) for size in (n, max(n - 1, 1), n, 1))
    info = integers(1)
    call("sbtrd", band.dtype, b"N", b"L", n, rows - 1, band, rows, d, e, Q, 1, work, info)
    return d, e[: n - 1]

"""A symmetric float32 matrix reduced to a tridiagonal one: all eigenvalues, and the eigenvectors that are asked for.

A = Q T Q^T costs 4/3 n^3; the eigenvalues of T follow in O(n^2), and k eigenvectors in O(n k) for T and 2 n^2 k for
Q. Nothing of A but its lower triangle is read, and A's memory becomes that of Q.
"""

from __future__ import annotations

import numpy as np

from htsr.errors import BadInput

BLOCK = 32  # columns reduced at a time
GROUP = 48  # vectors of T made orthogonal to each other; between groups they are merely different


class Tridiagonal:
    """Q T Q^T of `A` (float32, Fortran order, overwritten). Raises BadInput when A is not finite."""

    def __init__(self, A: np.ndarray) -> None:
        from scipy.linalg.lapack import dsterf, ssytrd

        side = len(A)
        self._factors, d, e, self._tau, _ = ssytrd(A, lower=1, lwork=BLOCK * side, overwrite_a=1)
        if not (np.isfinite(d).all() and np.isfinite(e).all()):
            raise BadInput("got a matrix that leaves the range of float32, expected one of moderate size")
        self._d, self._e = d, e
        self.values: np.ndarray = dsterf(d.astype(np.float64), e.astype(np.float64))[0]

    def vectors(self, indices: np.ndarray) -> np.ndarray:
        """Eigenvectors of A of the values at ascending `indices`, as float32 columns; unit, not quite orthogonal."""
        from scipy.linalg.lapack import sormqr, sstein

        n = len(self._d)
        whole = np.ones(n, np.int32), np.full(n, n, np.int32)
        wanted = self.values[indices].astype(np.float32)
        groups = [sstein(self._d, self._e, wanted[i : i + GROUP], *whole)[0] for i in range(0, len(wanted), GROUP)]
        V = np.asfortranarray(np.concatenate(groups, axis=1))
        # the reflectors lie below the subdiagonal: columns 0.. of the array that starts at A[1, 0], in A's own memory
        reflectors = self._factors.ravel(order="K")[1 : 1 + n * (n - 1)].reshape((n, n - 1), order="F")
        V[1:] = sormqr("L", "N", reflectors, self._tau, V[1:], BLOCK * n)[0]
        return V

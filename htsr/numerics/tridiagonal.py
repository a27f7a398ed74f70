"""A symmetric matrix reduced to a tridiagonal one: all eigenvalues, and chosen eigenvectors.

A = Q T Q^T costs 4/3 n^3; the eigenvalues of T follow in O(n^2), and k eigenvectors in O(n k) for T and 2 n^2 k for
Q. Nothing of A but its lower triangle is read, and A's memory becomes that of Q. (SciPy's own wrappers of these
routines hold the interpreter's lock, so that other workers would wait.)
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from htsr.errors import BadInput
from htsr.numerics.fortran import call, integers

BLOCK = 32  # columns reduced at a time
AT_ONCE = 64  # reflectors applied at a time
GROUP = 48  # vectors of T made orthogonal to each other; between groups they are merely different


def reduce(A: np.ndarray, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Diagonal, subdiagonal of T and the factors tau of Q; A (float, Fortran order) is overwritten by the rest of Q."""
    n, info = len(A), integers(1)
    d, e, tau, work = (np.empty(size, A.dtype) for size in (n, max(n - 1, 1), max(n - 1, 1), max(block * n, 1)))
    call("sytrd", A.dtype, b"L", n, A, n, d, e, tau, work, len(work), info)
    return d, e[: n - 1], tau[: n - 1]


def tridiagonal_values(d: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Compute the eigenvalues of a symmetric tridiagonal matrix.

    Args:
        d: the diagonal, shape (n,), float32 or float64.
        e: the subdiagonal, shape (n - 1,).

    Returns:
        n values, ascending, of the same dtype.

    Raises:
        LinAlgError: the eigenvalues were not found.
    """
    values, rest, info = d.copy(), np.append(e, d.dtype.type(0)), integers(1)
    call("sterf", d.dtype, len(d), values, rest, info)
    if info[0]:
        raise np.linalg.LinAlgError("the eigenvalues of a tridiagonal matrix did not converge")
    return values


class Tridiagonal:
    """The decomposition Q T Q^T of a symmetric matrix `A`, which is overwritten where it is in Fortran order.

    Attributes:
        values: all eigenvalues, ascending, float64.

    Raises:
        BadInput: A (float32 or float64) is not finite.
    """

    def __init__(self, A: np.ndarray, block: int = BLOCK) -> None:
        self._factors, self._dtype = np.asfortranarray(A), A.dtype
        self._d, self._e, self._tau = reduce(self._factors, block)
        if not (np.isfinite(self._d).all() and np.isfinite(self._e).all()):
            raise BadInput(f"got a matrix that leaves the range of {A.dtype}, expected one of moderate size")
        self.values: np.ndarray = tridiagonal_values(self._d.astype(np.float64), self._e.astype(np.float64))

    def vectors(self, indices: np.ndarray) -> np.ndarray:
        """Eigenvectors of A of the values at ascending `indices`, as columns; unit, not quite orthogonal."""
        wanted = self.values[indices].astype(self._dtype)
        groups = [self._inverse_iteration(wanted[i : i + GROUP]) for i in range(0, len(wanted), GROUP)]
        return self._rotate(np.asfortranarray(np.concatenate(groups, axis=1)), b"N")

    def solve(self, R: np.ndarray, shift: float) -> np.ndarray:
        """(A + shift)^-1 R to the accuracy of A's dtype, float64; `shift` makes A positive definite."""
        size = np.maximum(np.linalg.norm(R, axis=0), np.finfo(np.float64).tiny)
        X = self._rotate(np.asfortranarray(R / size, self._dtype), b"T")
        d, e, X = self._d.astype(np.float64) + shift, self._e.astype(np.float64), X.astype(np.float64, order="F")
        call("ptsv", np.float64, len(d), X.shape[1], d, e, X, len(d), integers(1))
        largest = np.abs(X).max() or 1.0
        return self._rotate(np.asfortranarray(X / largest, self._dtype), b"N") * (size * largest)

    def _inverse_iteration(self, values: np.ndarray) -> np.ndarray:
        """Vectors of T, orthogonal to each other. One that does not converge shows in its residual."""
        n, k = len(self._d), len(values)
        Z: np.ndarray = np.empty((n, k), self._dtype, order="F")
        one_block, split, work = integers(n, 1), integers(n, n), np.empty(5 * n, self._dtype)
        iwork, failed, info = integers(n), integers(k), integers(1)
        call("stein", self._dtype, n, self._d, self._e, k, values, one_block, split, Z, n, work, iwork, failed, info)
        return Z

    def _rotate(self, V: np.ndarray, form: bytes) -> np.ndarray:
        """Q V (b"N") or Q^T V (b"T"), in place."""
        n, k = V.shape
        work = np.empty(max(k * AT_ONCE, 1), self._dtype)
        order = reversed(self._reflectors) if form == b"N" else self._reflectors
        for i, T in order:  # I - R T R^T, with R below the subdiagonal from column i on
            R, size = self._factors[i + 1 :, i:], len(T)
            call(
                "larfb", self._dtype, b"L", form, b"F", b"C", n - 1 - i, k, size, R, n, T, size, V[i + 1 :], n, work, k
            )  # fmt: skip
        return V

    @cached_property
    def _reflectors(self) -> list[tuple[int, np.ndarray]]:
        """Q as a product of block reflectors: where each starts, and its triangle T."""
        n, found = len(self._factors), []
        for i in range(0, n - 1, AT_ONCE):
            size = min(AT_ONCE, n - 1 - i)
            T: np.ndarray = np.zeros((size, size), self._dtype, order="F")
            R = self._factors[i + 1 :, i:]
            call("larft", self._dtype, b"F", b"C", n - 1 - i, size, R, n, self._tau[i:], T, size)
            found.append((i, T))
        return found

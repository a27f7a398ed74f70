"""Exact spectra: lambda = sigma**2 of a matrix from the Gram matrix of its smaller side, a block at a time.

For W of N x M (N >= M):  G = W^T W = sum_b W_b^T W_b  over row blocks W_b, and lambda = eig(G). A wide matrix is
read in column blocks instead, so that memory is O(M^2) whatever N is and the whole matrix is never held.

dtype policy: everything is computed in float64 unless the caller passes float32; the result is always float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from htsr.errors import BadInput
from htsr.numerics.band import band_storage, band_to_tridiagonal, to_band
from htsr.numerics.fortran import call, lead
from htsr.numerics.tridiagonal import reduce, tridiagonal_values

BLOCK_ELEMENTS = 1 << 20  # 8 MiB of float64: large enough for BLAS, small enough for a cache and for many workers
CACHED_ELEMENTS = 1 << 19  # 4 MiB of float64
BLOCK_MULTIPLE = 256  # column blocks start at multiples of the quantisation blocks of every GGUF type
REDUCED_AT_ONCE = 16  # columns, on the way to a tridiagonal matrix
BAND_SIDE = {np.dtype(np.float64): 2560, np.dtype(np.float32): 3584}  # from here on two stages are faster than one


@dataclass(frozen=True)
class MatrixSlice:
    """Rows (`axis` 0) or columns (`axis` 1) `start` to `stop` of a matrix, `stop` exclusive."""

    start: int
    stop: int
    axis: int = 0

    def window(self, rows: int, cols: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(first, last) row and (first, last) column of the slice in a rows x cols matrix; the last is exclusive."""
        chosen = (self.start, self.stop)
        return (chosen, (0, cols)) if self.axis == 0 else ((0, rows), chosen)


def plan_slices(rows: int, cols: int) -> list[MatrixSlice]:
    """Cut a rows x cols matrix along its longer side; a function of the shape alone, so every source agrees bitwise."""
    longer, side = max(rows, cols), min(rows, cols)
    axis = 0 if rows >= cols else 1
    budget = max(BLOCK_ELEMENTS, side * side // 4)
    if rows * cols <= budget:
        return [MatrixSlice(0, rows)]
    step = max(budget // max(side, 1) // BLOCK_MULTIPLE, 1) * BLOCK_MULTIPLE
    return [MatrixSlice(i, min(i + step, longer), axis=axis) for i in range(0, longer, step)]


def as_array(block: Any, dtype: type = np.float64) -> np.ndarray:
    """A NumPy array of the wanted float type from an array or a torch tensor (bfloat16 too); torch is not imported."""
    if hasattr(block, "detach"):
        block = block.detach().cpu()
        block = (block.double() if dtype is np.float64 else block.float()).numpy()
    return np.asarray(block, dtype=dtype)


def in_float64(slices: Iterable[Any]) -> Iterator[np.ndarray]:
    """The same rows, a few at a time: what is multiplied by some vectors, and once more, is still in the cache then."""
    for block in slices:
        rows = max(CACHED_ELEMENTS // max(block.shape[1], 1), 1)
        for i in range(0, len(block), rows):
            yield as_array(block[i : i + rows])


def gram(slices: Iterable[Any], side: int, dtype: type = np.float64, *, mirror: bool = True) -> np.ndarray:
    """Compute G = sum_b S_b^T S_b over slices of a matrix, accumulated inside BLAS.

    Args:
        slices: arrays or tensors of any height and `side` columns.
        side: number of columns.
        dtype: np.float64 or np.float32, of the products and the sum.
        mirror: fills the upper triangle too; without it only the lower one is right.

    Returns:
        A symmetric array of shape (side, side) in Fortran order. NaN or infinity in a slice is NaN or infinity in G.
    """
    G: np.ndarray = np.zeros((side, side), dtype, order="F")
    for block in slices:
        S = as_array(block, dtype)
        form, A = (b"T", S) if S.flags.f_contiguous else (b"N", np.ascontiguousarray(S).T)
        call("syrk", dtype, b"L", form, side, len(S), 1.0, A, lead(A), 1.0, G, side)
    for i in range(0, side if mirror else 0, BLOCK_MULTIPLE):  # mirror the lower triangle
        j = min(i + BLOCK_MULTIPLE, side)
        G[i:j, j:] = G[j:, i:j].T
        G[i:j, i:j] = np.tril(G[i:j, i:j]) + np.tril(G[i:j, i:j], -1).T
    return G


def gram_eigenvalues(G: np.ndarray) -> np.ndarray:
    """Compute the eigenvalues of a Gram matrix, without the noise of its rounding.

    Args:
        G: symmetric, shape (side, side), float32 or float64; its lower triangle is read in Fortran order. It may be
            overwritten.

    Returns:
        side values, ascending, float64.

    Raises:
        BadInput: G holds NaN or infinity.
    """
    side = len(G)
    require_finite(G)
    lower = np.asfortranarray(G.T if G.flags.c_contiguous else G)
    if side >= BAND_SIDE[G.dtype]:
        to_band(lower)
        d, e = band_to_tridiagonal(band_storage(lower))
    else:
        d, e, _ = reduce(lower, REDUCED_AT_ONCE)
    values = tridiagonal_values(d, e) if side > 1 else d
    return without_noise(values, G.dtype.type)


def require_finite(G: Any) -> None:
    """Raise BadInput when a Gram matrix (an array or a tensor), and so the matrix behind it, is not finite."""
    if not (np.isfinite(G) if isinstance(G, np.ndarray) else G.isfinite()).all():
        raise BadInput("got a matrix with NaN or infinite entries, expected finite numbers; it has no spectrum")


def without_noise(values: np.ndarray, dtype: type) -> np.ndarray:
    """Set to 0 the eigenvalues of a Gram matrix that are no more than its rounding noise.

    A rank-deficient matrix has zeros there, not noise. (A singular value below about 1e-7 of the largest cannot be seen
    in a float64 Gram matrix.)

    Args:
        values: ascending eigenvalues, shape (side,).
        dtype: the float type that the Gram matrix was computed in; the limit is side * eps * lambda_max.

    Returns:
        The values as float64.
    """
    noise = len(values) * np.finfo(dtype).eps * values[-1]
    return np.where(values > noise, values, 0.0).astype(np.float64)


def read_slices(read: Callable[[MatrixSlice], Any], rows: int, cols: int) -> Iterator[Any]:
    """Read a matrix in the slices that `gram` takes, each with min(rows, cols) columns: those of a wide one transposed.

    Args:
        read: returns the rows or columns that a slice names.
        rows: number of rows of the matrix.
        cols: number of columns.
    """
    for block in plan_slices(rows, cols):
        yield read(block) if rows >= cols else read(block).T


def matrix_slices(W: Any) -> Iterator[Any]:
    """The slices of a matrix in memory, an array or a tensor, as `gram` takes them."""

    def read(block: MatrixSlice) -> Any:
        rows, cols = block.window(*W.shape)
        return W[slice(*rows), slice(*cols)]

    return read_slices(read, *W.shape)


def eigenvalues(W: Any, precision: type = np.float64) -> np.ndarray:
    """Compute the eigenvalues of W^T W, the squared singular values of a matrix.

    Args:
        W: shape (rows, cols), an array or tensor of any float dtype.
        precision: the float type of the computation, np.float64 or np.float32.

    Returns:
        min(rows, cols) values, ascending, float64.

    Raises:
        BadInput: W is not a matrix, is empty, or holds a number that is not finite.
    """
    shape = tuple(getattr(W, "shape", np.shape(W)))
    if len(shape) != 2 or 0 in shape:
        raise BadInput(f"got an array of shape {shape}, expected a non-empty matrix; pass one 2-D weight")
    W = W if hasattr(W, "shape") else np.asarray(W)
    return gram_eigenvalues(gram(matrix_slices(W), min(shape), precision))

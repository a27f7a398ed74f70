"""The costly steps of a spectrum, here in LAPACK; `device` has them in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from htsr.numerics.bf16 import has_matrix_units, medium_gram
from htsr.numerics.fullrank import has_full_rank
from htsr.numerics.ritz import residual_norms, ritz_values
from htsr.numerics.spectrum import (
    BAND_SIDE,
    REDUCED_AT_ONCE,
    as_array,
    gram,
    gram_eigenvalues,
    require_finite,
    without_noise,
)  # fmt: skip
from htsr.numerics.tridiagonal import Tridiagonal

UNITS_SIDE = 2048  # from here on torch is worth importing for the matrix units


class Reduced(Protocol):
    """A float32 Gram matrix, decomposed."""

    @property
    def values(self) -> np.ndarray:
        """All eigenvalues, ascending, float64."""

    def vectors(self, indices: np.ndarray) -> Any:
        """Eigenvectors of the values at `indices`, as columns."""

    def solve(self, R: np.ndarray, shift: float) -> np.ndarray:
        """(G + shift)^-1 R to float32's accuracy, where `shift` makes G positive definite."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The five costly steps of a spectrum as functions, so that they can run in LAPACK or in torch.

    Every slice has `side` columns, the shorter side of the matrix.

    Attributes:
        reduce: (slices, side, scale) -> the decomposition of scale^2 W^T W in float32.
        residuals: (slices, V, values) -> |W^T W v - value v| / |v| of every column of V, float64, shape (k,).
        ritz: (slices, V) -> the ascending eigenvalues of W^T W within the span of V, float64, shape (k,).
        full_rank: (A, dtype) -> whether the square matrix A clearly has full rank, computed in `dtype`.
        exact: (slices, side) -> the ascending eigenvalues in float64 without noise, and the decomposition they came
            from where it has vectors.
        exact_side: up to this side float64 throughout is no slower than the certified route; None means
            `certified.EXACT_SIDE`.
    """

    reduce: Callable[[Iterable[Any], int, float], Reduced]  # slices, side, scale -> of scale^2 W^T W
    residuals: Callable[[Iterable[Any], Any, np.ndarray], np.ndarray]
    ritz: Callable[[Iterable[Any], Any], np.ndarray]
    full_rank: Callable[[Any, type], bool]
    exact: Callable[[Iterable[Any], int], tuple[np.ndarray, Reduced | None]]  # float64, without noise
    exact_side: int | None = None


def _reduce(slices: Iterable[Any], side: int, scale: float) -> Tridiagonal:
    scaled = (as_array(block, np.float32) * np.float32(scale) if scale != 1 else block for block in slices)
    if has_matrix_units() and side >= UNITS_SIDE:
        return Tridiagonal(medium_gram(scaled, side))
    return Tridiagonal(gram(scaled, side, np.float32, mirror=False))


def _exact_values(slices: Iterable[Any], side: int) -> tuple[np.ndarray, Tridiagonal | None]:
    G = gram(slices, side, mirror=False)
    if side >= BAND_SIDE[G.dtype]:
        return gram_eigenvalues(G), None
    require_finite(G)
    reduced = Tridiagonal(G, REDUCED_AT_ONCE)
    return without_noise(reduced.values, np.float64), reduced


LAPACK = Backend(
    reduce=_reduce,
    residuals=residual_norms,
    ritz=ritz_values,
    full_rank=has_full_rank,
    exact=_exact_values,
)

"""Spectra of large matrices: float32 for the bulk, float64 for the tail, and proof that the fit is float64's.

    1. G = W^T W in float32 (scaled by a power of two), G = Q T Q^T: all eigenvalues, the rough ones.
    2. How wrong they are is measured: residuals |W^T W v - y v| in float64 of NUM_PROBES vectors v across the spectrum
       (about .05 eps lambda_max in the bulk, up to 2 eps lambda_max at the top, eps = 2^-23). SAFETY times the largest
       residual of a probe at or below the next one up is the radius of a rough eigenvalue.
    3. The candidates for xmin that these radii leave open say how deep the tail must be known (`certificate.judge`).
    4. Rayleigh-Ritz in float64 on the float32 eigenvectors of that tail. A vector with residual rho costs its Ritz
       value rho^2 / gap, gap the distance to the part of the spectrum left out (second-order perturbation theory).
    5. `judge` again, with these radii: no candidate but the best is left, or step 4 goes deeper, or the whole matrix
       is done in float64 ("escalated").

Eigenvalues within their radius of zero are no more than noise. That concerns two numbers: the fit (the certificate
treats them as unknown) and the rank, which the entropy is normalised by. When there are some, they are found from the
matrix itself (`smallend`); where that fails an LU factorisation must show full rank, else the matrix is escalated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from htsr.errors import BadInput
from htsr.numerics.backend import LAPACK, Backend, Reduced
from htsr.numerics.certificate import Verdict, judge
from htsr.numerics.metrics import EIGENVALUE_CUT
from htsr.numerics.powerlaw import fit_power_law
from htsr.numerics.smallend import noise_resolved
from htsr.numerics.spectrum import as_array, gram, gram_eigenvalues

EXACT_SIDE = 1024  # up to here float64 costs next to nothing, unless the backend knows better
NUM_PROBES, SAFETY = 16, 3.0
GUARD = 8  # vectors beyond those that the deepest open candidate needs
TAIL_PRECISION = 1e-7  # of the refined values at first, relative
MIN_TAIL = 48
ATTEMPTS = 3
SAMPLE_SIDE, LONG_TAIL = 512, 0.38
ALPHA_TOLERANCE = 5e-7
EPS32, EPS64 = float(np.finfo(np.float32).eps), float(np.finfo(np.float64).eps)

Read = Callable[[], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The eigenvalues of a matrix, and how they were found.

    Attributes:
        values: ascending lambda = sigma^2, float64.
        route: "fp32", "fp64", "certified" (float32 with a float64 tail) or "escalated" (float64 after all).
        refined: number of values, from the largest down, that are float64's.
        reason: why the matrix was escalated, else empty.
        flops: floating-point operations of all that was computed.
    """

    values: np.ndarray
    route: str
    refined: int
    reason: str = ""
    flops: float = 0.0


class OpenError(Exception):
    """Float32 could not show that the fit is float64's; the text says what stayed open."""


def spectrum(
    read: Read,
    rows: int,
    cols: int,
    *,
    precision: str = "auto",
    square: Callable[[], Any] | None = None,
    backend: Backend = LAPACK,
    relative_cut: float | None = None,
) -> Spectrum:
    """Compute the eigenvalues lambda = sigma^2 of a matrix that is read in slices.

    Args:
        read: returns the slices of the matrix from the start, each with min(rows, cols) columns; called several times.
        rows: number of rows of the matrix.
        cols: number of columns.
        precision: "fp64" or "fp32" for the whole matrix; "auto" is the certified route for sides beyond the backend's
            `exact_side` and "fp64" up to it.
        square: returns any square part of the matrix with min(rows, cols) rows; without it a spectrum that reaches
            down to the noise of float32 is escalated.
        backend: where the costly steps run.
        relative_cut: the fit sees eigenvalues above this share of the largest; None is the absolute EIGENVALUE_CUT.

    Returns:
        min(rows, cols) values and how they were found.

    Raises:
        BadInput: the matrix is not finite.
    """
    m, n = max(rows, cols), min(rows, cols)
    if precision == "fp32":
        values = gram_eigenvalues(gram(read(), n, np.float32))
        return Spectrum(values=values, route="fp32", refined=0, flops=whole_flops(n, m))
    full_rank = functools.cache(lambda dtype: square is not None and backend.full_rank(square(), dtype))
    if precision == "fp64" or n <= (EXACT_SIDE if backend.exact_side is None else backend.exact_side):
        return Spectrum(values=_exact(read, m, n, full_rank, backend), route="fp64", refined=n, flops=whole_flops(n, m))
    counter = [0.0]
    try:
        values, refined = _certified(read, m, n, full_rank, backend, relative_cut, counter)
        return Spectrum(values=values, route="certified", refined=refined, flops=counter[0])
    except (OpenError, np.linalg.LinAlgError) as error:
        values = _exact(read, m, n, full_rank, backend)
        flops = counter[0] + whole_flops(n, m)
        return Spectrum(values=values, route="escalated", refined=n, reason=str(error), flops=flops)


def _exact(read: Read, m: int, n: int, full_rank: Callable[[type], bool], backend: Backend) -> np.ndarray:
    """Compute in float64 throughout; zeros of the Gram matrix are checked on the matrix itself."""
    values, reduced = backend.exact(read(), n)
    zeros = int(np.count_nonzero(values == 0))
    if not 0 < zeros < n:
        return values
    if reduced is not None:
        radius = np.full(n, n * EPS64 * float(values[-1]))
        found, _ = noise_resolved(read, m, reduced, reduced.values, radius)
        if found is not None:
            return np.concatenate([np.minimum(found[:zeros], values[zeros]), values[zeros:]])
    if full_rank(np.float32) or full_rank(np.float64):
        return np.maximum(values, 1e-3 * EPS64 * values[-1])
    return values


def whole_flops(n: int, m: int) -> float:
    """n^2 m for one triangle of the Gram matrix and 4/3 n^3 to make it tridiagonal."""
    return float(n * n * m + 4 / 3 * n**3)


def ritz_flops(n: int, m: int, k: int) -> float:
    """The vectors (2 n^2 k), W V (2 n m k) and two Gram matrices of k columns."""
    return float(2 * n * n * k + 2 * n * m * k + (n + m) * k * k)


def _certified(
    read: Read,
    m: int,
    n: int,
    full_rank: Callable[[type], bool],
    backend: Backend,
    relative_cut: float | None,
    counter: list[float],
) -> tuple[np.ndarray, int]:
    """The values and how many of them are refined; an OpenError where they cannot be certified."""
    scale, share = sample(read, m, n, relative_cut)
    if share > LONG_TAIL:
        raise OpenError(f"a small part of it has {share:.0%} of its eigenvalues in the tail")
    counter[0] += whole_flops(n, m)
    try:
        reduced = backend.reduce(read(), n, scale)
    except BadInput as error:  # beyond float32, or beyond any float: float64 will tell
        raise OpenError(str(error)) from error
    rough = reduced.values / scale**2
    cut = EIGENVALUE_CUT if relative_cut is None else relative_cut * float(rough[-1])
    radius = _radii(read, reduced, rough, backend)
    counter[0] += 4 * n * m * NUM_PROBES
    values = np.maximum(rough, 0.0)
    if np.count_nonzero(values - radius > cut) < MIN_TAIL:
        raise OpenError("hardly an eigenvalue is above the cut and above the noise of float32")
    verdict, precision = judge(values, radius, cut), TAIL_PRECISION
    first = _depth(values, radius, verdict, precision)
    _check_worth(n, m, n - first)
    if noise := int(np.max(np.flatnonzero(rough <= radius), initial=-1)) + 1:
        known = _small_values(read, m, reduced, scale, rough, radius, full_rank, counter)
        values[:noise] = np.minimum(known[:noise], values[noise])
    for _ in range(ATTEMPTS):
        theta = backend.ritz(read(), reduced.vectors(np.arange(first, n)))
        counter[0] += ritz_flops(n, m, n - first)
        radius *= max(1.0, 2 * float(np.max(np.abs(theta - rough[first:]) / radius[first:])))
        merged, known = merge(values, theta, first, radius)
        verdict = judge(merged, known, cut)
        if verdict.rival < 0 and verdict.alpha_error <= ALPHA_TOLERANCE:
            return merged, n - first
        if verdict.rival >= first:
            raise OpenError("two candidates for xmin are too close")  # and well known: more depth would not help
        precision *= min(1.0, ALPHA_TOLERANCE / verdict.alpha_error / 2)
        deeper = _depth(merged, radius, verdict, precision)
        first = deeper if deeper < first else max(first - MIN_TAIL, 0)
        _check_worth(n, m, n - first)
    raise OpenError("the tail cannot be told from the rest")


def _radii(read: Read, reduced: Reduced, rough: np.ndarray, backend: Backend) -> np.ndarray:
    """How far each rough eigenvalue may be off; grows with the index."""
    n = len(rough)
    near_top = n - np.unique(np.geomspace(1, n // 4, NUM_PROBES // 2).astype(int))
    bulk = np.linspace(0, n - n // 4, NUM_PROBES - len(near_top), endpoint=False).astype(int)
    probes = np.unique(np.concatenate([bulk, near_top]))
    norms = backend.residuals(read(), reduced.vectors(probes), rough[probes])
    if not np.isfinite(norms).all():
        raise OpenError("its values leave the range of float32")
    envelope = SAFETY * np.maximum.accumulate(norms) + 64 * EPS64 * float(rough[-1])
    return envelope[np.minimum(np.searchsorted(probes, np.arange(n)), len(probes) - 1)]


def _depth(values: np.ndarray, radius: np.ndarray, verdict: Verdict, precision: float) -> int:
    """The first index to refine, so that the best candidate and the lowest open one lie well inside the refined part.

    A Ritz value is as good as its distance to the first value left out (see `merge`): that has to be below the lowest
    candidate by its radius squared over `precision`, the error that is allowed relative to it.
    """
    lowest = min(verdict.best if verdict.rival < 0 else min(verdict.best, verdict.rival), len(values) - MIN_TAIL)
    edge = values[lowest] - radius[lowest] ** 2 / (precision * values[lowest])
    return max(int(np.searchsorted(values, edge)) - GUARD, 0)


def _check_worth(n: int, m: int, k: int) -> None:
    """Beyond this size refining costs as much as float64 throughout, whose reduction runs at half the speed."""
    if ritz_flops(n, m, k) > 0.5 * (n * n * m + 8 / 3 * n**3):
        raise OpenError(f"{k} of {n} eigenvalues belong to the tail or may")


def _small_values(
    read: Read,
    m: int,
    reduced: Reduced,
    scale: float,
    rough: np.ndarray,
    radius: np.ndarray,
    full_rank: Callable[[type], bool],
    counter: list[float],
) -> np.ndarray:
    """The values that float32 cannot tell from zero: right to a factor of 2, and zero where the matrix lacks rank.

    The rank needs no more. Where finding them is too much work they are raised above the limit of the rank, once full
    rank is shown in another way.
    """
    found, flops = noise_resolved(read, m, reduced, rough, radius, scale)
    counter[0] += flops
    if found is not None:
        return found
    for dtype in (np.float32, np.float64):
        counter[0] += 2 / 3 * len(rough) ** 3
        if full_rank(dtype):
            return np.maximum(rough, 1e-3 * EPS32 * float(rough[-1]))
    raise OpenError("it may lack rank")


def merge(values: np.ndarray, theta: np.ndarray, first: int, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replace the upper part of a rough spectrum by Ritz values.

    Args:
        values: rough eigenvalues, ascending, shape (n,).
        theta: Ritz values of the n - first largest, ascending.
        first: the index in `values` from which on `theta` replaces them.
        radius: how far each rough value may be off, shape (n,).

    Returns:
        The ascending spectrum and the radius of every value, both of shape (n,).
    """
    rounding = 64 * EPS64 * float(theta[-1])
    known = radius.copy()
    if first:
        gap = np.maximum(theta - (values[first - 1] + radius[first - 1]), 1e-300)
        with np.errstate(over="ignore"):
            known[first:] = np.minimum(radius[first:], radius[first:] ** 2 / gap)
        known[first:] += rounding
    else:
        known[:] = rounding
    return np.concatenate([np.minimum(values[:first], theta[0]), theta]), known


def sample(read: Read, m: int, n: int, relative_cut: float | None) -> tuple[float, float]:
    """Look at a part of the matrix: the scale of its entries, and how much of its spectrum is tail.

    The part holds 1/f of the columns and the first 1/f of the rows, f = 4 or what makes it SAMPLE_SIDE wide. That costs
    1/f^3 of the whole and only decides the route: a matrix whose tail is its bulk goes to float64 at once.

    Args:
        read: returns the slices of the matrix.
        m: the longer side.
        n: the shorter side.
        relative_cut: as in `spectrum`.

    Returns:
        A power of two that brings the entries near 1, and the share of the tail in the part's eigenvalues, in [0, 1].
    """
    step = max(4, n // SAMPLE_SIDE)
    parts: list[np.ndarray] = []
    missing = m // step
    for block in read():
        part = as_array(block[:missing, ::step], np.float32)
        parts.append(part)
        missing -= len(part)
        if missing <= 0:
            break
    W = np.concatenate(parts)
    with np.errstate(invalid="ignore", over="ignore"):
        largest = float(np.max(np.abs(W), initial=0.0))
    if not (np.isfinite(largest) and largest > 0):
        return 1.0, 0.0
    scale = float(2.0 ** -np.frexp(largest)[1])
    x = gram_eigenvalues(gram([W * np.float32(scale)], W.shape[1], np.float32)) / scale**2
    x = x[x > (EIGENVALUE_CUT if relative_cut is None else relative_cut * x[-1])]
    fit = fit_power_law(x)
    return scale, fit.n_tail / len(x) if len(x) else 0.0

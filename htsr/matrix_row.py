"""One matrix of a model: its spectrum, its fit and its metrics, as a row of the scan."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from htsr.errors import BadInput
from htsr.model.layers import LayerView
from htsr.model.reading import read_part, read_slice, thin_factors
from htsr.model.source import Source
from htsr.numerics import certified
from htsr.numerics.backend import LAPACK, Backend
from htsr.numerics.certified import Spectrum
from htsr.numerics.lowrank import product_eigenvalues
from htsr.numerics.metrics import EIGENVALUE_CUT, RELATIVE_CUT, alpha_hat, spectrum_metrics
from htsr.numerics.powerlaw import FitStatus, fit_power_law
from htsr.numerics.spectrum import MatrixSlice, gram, gram_eigenvalues, matrix_slices, read_slices

PRECISIONS: dict[str, type] = {"auto": np.float64, "fp64": np.float64, "fp32": np.float32}
COLUMNS = (
    "block", "role", "tensor", "rows", "cols", "dtype", "alpha", "alpha_sigma", "ks_d", "xmin", "n_tail",
    "alpha_hill", "alpha_hat", "log10_norm", "log10_spectral_norm", "lambda_max", "stable_rank", "entropy",
    "lod", "lod_weight", "status", "reason", "seconds", "part_of",
)  # fmt: skip
BASE_COLUMNS = ("relative_change",)  # of a scan against a base: ||W - W_base|| / ||W_base||


def cost(view: LayerView) -> float:
    """Floating-point operations of a spectrum: n^2 m for the Gram matrix and 4/3 n^3 to make it tridiagonal."""
    shapes = [(part.rows.size, part.cols.size) for part in view.pool] or [(view.rows, view.cols)]
    return sum(certified.whole_flops(*sorted(shape)) for shape in shapes)


def empty_row(view: LayerView, status: str, reason: str) -> dict[str, Any]:
    """The row of a tensor about which nothing was computed."""
    known = {name: getattr(view, name) for name in ("block", "role", "tensor", "rows", "cols", "dtype", "part_of")}
    return {**dict.fromkeys(COLUMNS, np.nan), **known, "status": status, "reason": reason}


def analyse(
    source: Source, view: LayerView, precision: str = "auto", device: str = "cpu"
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Compute the row of a matrix in the scan.

    Args:
        source: an open model.
        view: the matrix.
        precision: "auto", "fp64" or "fp32", see `htsr.numerics.certified.spectrum`.
        device: where the spectrum is computed.

    Returns:
        The row and the eigenvalues. Beside COLUMNS the row has how the spectrum was found: `route`, `refined`, `why`
        and `flops`. Numbers that cannot be analysed make a failed row without eigenvalues (None), and no error.
    """
    if view.reason:
        return empty_row(view, "skipped", view.reason), None
    start = time.perf_counter()
    row = empty_row(view, "ok", "")
    try:
        found = spectrum(source, view, precision, device)
        values = found.values
    except (BadInput, np.linalg.LinAlgError) as error:
        reason = why_failed(source, view, error)
        return {**row, "status": "failed", "reason": reason, "seconds": time.perf_counter() - start}, None
    if source.is_delta and not values.any():
        return {**row, "status": "skipped", "reason": "unchanged: every entry of the difference is zero"}, None
    row.update(measure(values, longer_side(view), relative_cut=source.is_delta))
    if (change := source.relative_change(view)) is not None:
        row["relative_change"] = change
    row |= {"route": found.route, "refined": found.refined, "why": found.reason, "flops": found.flops}
    row["seconds"] = time.perf_counter() - start
    return row, values


def spectrum(source: Source, view: LayerView, precision: str = "auto", device: str = "cpu") -> Spectrum:
    """Compute the eigenvalues of a matrix: from its Gram matrix, from thin factors, or pooled over a kernel's slices.

    Args:
        source: an open model.
        view: the matrix.
        precision: "auto", "fp64" or "fp32".
        device: where the Gram matrix and its eigenvalues are computed; the other two ways are cheap and use the CPU.
    """
    if view.pool:
        route = "fp32" if precision == "fp32" else "fp64"
        values = pooled_eigenvalues(source, view, PRECISIONS[precision])
        return Spectrum(values=values, route=route, refined=len(values), flops=cost(view))
    if (factors := thin_factors(source, view)) is not None:
        values = product_eigenvalues(*factors)
        return Spectrum(values=values, route="fp64", refined=len(values))
    side = min(view.rows, view.cols)
    return certified.spectrum(
        lambda: slices(source, view, device),
        view.rows,
        view.cols,
        precision=precision,
        square=lambda: read_slice(source, view, MatrixSlice(0, side, axis=0 if view.rows >= view.cols else 1)),
        relative_cut=RELATIVE_CUT if source.is_delta else None,
        backend=backend(device),
    )


def backend(device: str) -> Backend:
    """LAPACK on the CPU, torch elsewhere."""
    if device == "cpu":
        return LAPACK
    from htsr.numerics.device import torch_backend

    return torch_backend(device)


def pooled_eigenvalues(source: Source, view: LayerView, dtype: type) -> np.ndarray:
    """Compute the eigenvalues of all slices (out, in) of a convolution's kernel, sorted together and halved.

    The halving is weightwatcher's, which scales the slices by sqrt(1/2).

    Args:
        source: an open model.
        view: a view with a pool.
        dtype: the float type of the computation.

    Note: weightwatcher takes a kernel that is larger than its channels for channels; this function does not.
    """
    values = []
    for part in view.pool:
        rows, cols = part.rows.size, part.cols.size
        blocks = read_slices(partial(read_part, source, part), rows, cols)
        values.append(gram_eigenvalues(gram(blocks, min(rows, cols), dtype)))
    return np.sort(np.concatenate(values)) / 2


def longer_side(view: LayerView) -> int:
    """The larger dimension of a view's matrix, of one slice for a convolution."""
    return max(view.pool[0].rows.size, view.pool[0].cols.size) if view.pool else max(view.rows, view.cols)


def measure(eigenvalues: np.ndarray, longer_side: int, *, relative_cut: bool = False) -> dict[str, Any]:
    """Compute the fit and the metrics of a spectrum.

    Args:
        eigenvalues: ascending, shape (n,); the metrics see all of them, the fit those above the cut.
        longer_side: the larger dimension of the matrix.
        relative_cut: the cut is 1e-12 of the largest eigenvalue, for weights whose scale means nothing, instead of
            weightwatcher's absolute 1e-5.

    Returns:
        The columns of a row that depend on the spectrum alone, its status and the reason of a failed fit.
    """
    cut = RELATIVE_CUT * float(np.max(eigenvalues)) if relative_cut else EIGENVALUE_CUT
    above = eigenvalues[eigenvalues > cut]
    fit, metrics = fit_power_law(above), spectrum_metrics(eigenvalues, longer_side)
    row = {**asdict(metrics), "status": "ok", "reason": ""}
    if fit.status is not FitStatus.OK:
        left = f" ({len(above)} of {len(eigenvalues)} eigenvalues are above {cut:g})"
        return {**row, "status": "failed", "reason": fit.status.sentence + left}
    return {
        **row,
        "alpha": fit.alpha,
        "alpha_sigma": fit.sigma,
        "ks_d": fit.ks_d,
        "xmin": fit.xmin,
        "n_tail": fit.n_tail,
        "alpha_hat": alpha_hat(fit.alpha, metrics.lambda_max),
    }


def slices(source: Source, view: LayerView, device: str = "cpu") -> Iterator[Any]:
    """Read a matrix in slices as wide as its shorter side, one at a time.

    Args:
        source: an open model.
        view: the matrix.
        device: where the slices are used. For another device than the CPU a matrix in memory comes as tensors in its
            own dtype, from the device that it is on.
    """
    W = source.in_memory(view.tensor) if device != "cpu" and view.part is None else None
    if W is not None:
        return matrix_slices(W)
    return read_slices(partial(read_slice, source, view), view.rows, view.cols)


def why_failed(source: Source, view: LayerView, error: Exception) -> str:
    """Why a spectrum could not be computed: the number of NaN and infinite entries, or the error's own message."""
    try:
        bad = sum(int(part.size - np.isfinite(part).sum()) for part in slices(source, view))
    except BadInput:  # the file itself cannot be read
        bad = 0
    return f"{bad} of {view.rows * view.cols} entries are NaN or infinite" if bad else str(error)

"""The columns of --nulls: how much of a matrix's numbers noise, a threshold or another law would explain.

Everything here costs more than the scan's own numbers, so it runs on request. All of it is a function of the weights,
the tensor's name and the seed: neither the order of the matrices nor the number of workers changes a digit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from htsr.console import progress
from htsr.matrix_row import slices
from htsr.model.layers import LayerView
from htsr.model.source import Source
from htsr.null_columns import INTEGER_COLUMNS, NULL_COLUMNS, TEXT_COLUMNS
from htsr.numerics.bootstrap import alpha_interval
from htsr.numerics.farms import alpha_farms
from htsr.numerics.goodness import goodness_of_fit
from htsr.numerics.likelihood_ratio import against_exponential, against_lognormal
from htsr.numerics.marchenko_pastur import fit_noise
from htsr.numerics.metrics import EIGENVALUE_CUT, RELATIVE_CUT, effective_rank
from htsr.numerics.permutation import measure_entries, permutation_p
from htsr.numerics.powerlaw import FitStatus, fit_power_law
from htsr.numerics.thresholds import alpha_average, alpha_range, ks_curve
from htsr.workers import run

MAX_ENTRIES = 1 << 28  # 1 GiB as float32; a larger matrix is neither held nor permuted


def null_rows(
    source: Source,
    layers: Sequence[LayerView],
    spectra: Mapping[str, np.ndarray],
    *,
    seed: int,
    workers: int | None = None,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """tensor -> its NULL_COLUMNS, for every matrix with a spectrum; what could not be computed is left out."""
    analysed = sorted((v for v in layers if v.tensor in spectra), key=lambda view: -view.rows * view.cols)
    found = {}
    done = run(
        lambda view: null_row(source, view, spectra[view.tensor], seed),
        analysed,
        lambda view: min(view.rows, view.cols),
        workers,
    )
    with progress(len(analysed), "nulls", "matrix", quiet=quiet) as bar:
        for view, row in done:
            found[view.tensor] = row
            bar.update(1)
    return found


def with_nulls(frame: pd.DataFrame, found: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Add the NULL_COLUMNS to the frame of a scan; cells of a tensor without results are empty."""
    rows = [found.get(tensor, {}) for tensor in frame["tensor"]]
    columns = {}
    for name in NULL_COLUMNS:
        values = [row.get(name, "" if name in TEXT_COLUMNS else np.nan) for row in rows]
        kind = None if name in TEXT_COLUMNS else "Int64" if name in INTEGER_COLUMNS else "float64"
        columns[name] = pd.Series(values, index=frame.index, dtype=kind)
    return frame.assign(**columns)


def null_row(source: Source, view: LayerView, eigenvalues: np.ndarray, seed: int) -> dict[str, Any]:
    """The NULL_COLUMNS of one matrix whose ascending eigenvalues are known."""
    rng = generator(seed, view.tensor)
    cut = RELATIVE_CUT * float(eigenvalues[-1]) if source.is_delta else EIGENVALUE_CUT
    row = {**fit_nulls(eigenvalues[eigenvalues > cut], rng), "effective_rank": effective_rank(eigenvalues)}
    if not view.pool:  # the pooled slices of a convolution are not the spectrum of one matrix
        row |= noise_nulls(eigenvalues, view.rows, view.cols)
        row |= entry_nulls(source, view, float(eigenvalues[-1]), cut, rng)
    return row


def generator(seed: int, tensor: str) -> np.random.Generator:
    """The random numbers of one tensor: they depend on its name and the seed alone."""
    name = int.from_bytes(hashlib.sha256(tensor.encode()).digest()[:8], "little")
    return np.random.default_rng([seed % 2**64, name])


def fit_nulls(eigenvalues: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """The columns that follow from the eigenvalues above the cut alone; none where there is no fit."""
    fit = fit_power_law(eigenvalues)
    if fit.status is not FitStatus.OK:
        return {}
    interval, curve = alpha_interval(eigenvalues, rng), ks_curve(eigenvalues)
    least, most = alpha_range(curve)
    tail = eigenvalues[eigenvalues >= fit.xmin]
    lognormal, exponential = against_lognormal(tail, fit.xmin), against_exponential(tail, fit.xmin)
    return {
        "alpha_low": interval.low,
        "alpha_high": interval.high,
        "share_below_2": interval.share(-np.inf, 2),
        "share_2_to_4": interval.share(2, 4),
        "share_4_to_6": interval.share(4, 6),
        "share_above_6": interval.share(6, np.inf),
        "alpha_least": least,
        "alpha_most": most,
        "alpha_avg": alpha_average(curve),
        "p_gof": goodness_of_fit(eigenvalues, rng),
        "z_lognormal": lognormal.z,
        "p_lognormal": lognormal.p,
        "z_exponential": exponential.z,
        "p_exponential": exponential.p,
    }


def noise_nulls(eigenvalues: np.ndarray, rows: int, cols: int) -> dict[str, float]:
    """Marchenko-Pastur noise in a spectrum, from the eigenvalues alone."""
    missing = min(rows, cols) - len(eigenvalues)  # a product of thin factors lists its non-zero eigenvalues only
    noise = fit_noise(np.concatenate([np.zeros(missing), eigenvalues]), rows, cols)
    return {"mp_sigma": noise.sigma, "mp_edge": noise.edge, "num_spikes": noise.num_spikes, "p_edge": noise.p_edge}


def entry_nulls(
    source: Source, view: LayerView, lambda_max: float, cut: float, rng: np.random.Generator
) -> dict[str, Any]:
    """Compute the columns that need the entries of a matrix: the kurtosis, p_null and alpha_farms.

    Args:
        source: an open model.
        view: the matrix. One of more than 2^28 entries is read once for its moments and never held: it has no
            alpha_farms, and a p_null only where that needs no permutation.
        lambda_max: its largest eigenvalue.
        cut: eigenvalues above it enter alpha_farms.
        rng: shuffles the entries.
    """
    entries = measure_entries(slices(source, view), view.rows, view.cols)
    row: dict[str, Any] = {"kurtosis": entries.kurtosis}
    unit = 2.0 ** np.floor(np.log2(entries.largest or 1.0))  # of float32 entries near 1, whatever the weights' scale
    W = full_matrix(slices(source, view), view, unit) if view.rows * view.cols <= MAX_ENTRIES else None
    if W is not None:
        row["alpha_farms"] = alpha_farms(W.T if view.transposed else W, cut / unit**2)
    if entries.light_tailed:
        row |= {"p_null": entries.noise_survival(lambda_max), "p_null_by": "tracy-widom"}
    elif not np.isnan(bound := entries.bound_survival(lambda_max)):
        row |= {"p_null": bound, "p_null_by": "bound"}
    elif W is not None:
        row |= {"p_null": permutation_p(W, lambda_max / unit**2, rng), "p_null_by": "permutation"}
    return row


def full_matrix(blocks: Iterator[np.ndarray], view: LayerView, unit: float) -> np.ndarray:
    """The matrix (rows, cols) over `unit` as C-contiguous float32, from slices as wide as its shorter side."""
    tall = view.rows >= view.cols
    W = np.empty((view.rows, view.cols), np.float32)
    across, start = W if tall else W.T, 0
    for block in blocks:
        across[start : start + len(block)] = np.asarray(block) / unit
        start += len(block)
    return W

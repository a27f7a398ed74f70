"""The native numbers against the weightwatcher that is installed, matrix by matrix on the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from htsr.console import progress, quiet_libraries
from htsr.errors import HtsrError
from htsr.model.layers import views
from htsr.model.source import open_source
from htsr.rows import analyse, cost

# native column -> weightwatcher's
SAME = {
    "alpha": "alpha", "ks_d": "D", "xmin": "xmin", "n_tail": "num_pl_spikes", "alpha_sigma": "sigma",
    "alpha_hat": "alpha_weighted", "log10_norm": "log_norm", "log10_spectral_norm": "log_spectral_norm",
    "stable_rank": "stable_rank", "entropy": "entropy",
}  # fmt: skip
ALPHA_TOLERANCE = 1e-6


def verify(model: Any, *, allow_pickle: bool = False, revision: str | None = None, quiet: bool = False) -> pd.DataFrame:
    """A row a matrix: each number of both sides, and `agrees` (equal n_tail, alpha within 1e-6).

    Both sides read the same weights (in fp32), one matrix at a time. A matrix that only one side analyses has an empty
    other side and agrees when neither has an alpha; `note` says so.

    Raises:
        HtsrError: weightwatcher is not installed.
    """
    source = open_source(model, allow_pickle=allow_pickle, revision=revision)
    layers = [view for view in views(source) if not view.reason]
    records = []
    with progress(sum(map(cost, layers)) / 1e9, "verify", "Gflop", quiet=quiet) as bar:
        for view in layers:
            native, _ = analyse(source, view)
            theirs = weightwatcher_row(source.read(view.tensor).float())
            records.append(compare_rows(native, theirs))
            bar.update(cost(view) / 1e9)
    return pd.DataFrame.from_records(records)


def compare_rows(native: dict[str, Any], theirs: dict[str, Any] | None) -> dict[str, Any]:
    """Both sides of a matrix in one record."""
    row: dict[str, Any] = {"tensor": native["tensor"]}
    for ours, name in SAME.items():
        row[ours] = float(native[ours])
        row[f"ww_{ours}"] = np.nan if theirs is None else float(theirs[name])
    failed = theirs is not None and theirs["alpha"] == -1  # their word for a fit that failed
    if failed:
        row |= {f"ww_{ours}": np.nan for ours in ("alpha", "ks_d", "xmin", "n_tail", "alpha_sigma", "alpha_hat")}
    difference = abs(row["alpha"] - row["ww_alpha"])
    neither = np.isnan(row["alpha"]) and np.isnan(row["ww_alpha"])
    row["alpha_difference"] = difference
    row["agrees"] = bool(
        neither or theirs is None or (difference <= ALPHA_TOLERANCE and row["n_tail"] == row["ww_n_tail"])
    )
    row["note"] = "not analysed by weightwatcher" if theirs is None else ("its fit failed" if failed else "")
    return row


def weightwatcher_row(weights: Any) -> dict[str, Any] | None:
    """weightwatcher's details of one matrix; None where it leaves the matrix out (its limits on size)."""
    from torch import nn

    with quiet_libraries(prints=True):
        try:
            import weightwatcher
        except ImportError as error:
            raise HtsrError("weightwatcher cannot be imported; install it to verify against it") from error
        layer = nn.Linear(weights.shape[1], weights.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weights, requires_grad=False)
        details = weightwatcher.WeightWatcher(model=nn.Sequential(layer)).analyze()
    return dict(details.iloc[0]) if len(details) else None

"""The native numbers against the weightwatcher that is installed, matrix by matrix on the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from htsr import weightwatcher_engine as ww
from htsr.console import progress
from htsr.matrix_row import analyse, cost
from htsr.model.layers import views
from htsr.model.open import open_source

# how far a column may differ, relative to the larger of 1 and weightwatcher's number
TOLERANCE = dict.fromkeys(ww.SAME, 1e-6) | {"n_tail": 0.0, "alpha_hat": 1e-5, "entropy": 1e-5}


def verify(model: Any, *, allow_pickle: bool = False, revision: str | None = None, quiet: bool = False) -> pd.DataFrame:
    """Compare the native numbers with weightwatcher's, on the same weights.

    weightwatcher works in fp32 and one matrix at a time.

    Args:
        model: as `htsr.scan` takes it.
        allow_pickle: accepts pickled weights.
        revision: branch, tag or commit of a Hugging Face id.
        quiet: shows no progress bar.

    Returns:
        A row a matrix: each number of both sides, the columns that `differ`, whether the row `agrees`, and a `note`. A
        matrix that weightwatcher leaves out has an empty other side and agrees; a fit that only one side has does not.

    Raises:
        HtsrError: weightwatcher is not installed.
    """
    source = open_source(model, allow_pickle=allow_pickle, revision=revision)
    layers = [view for view in views(source) if not view.reason]
    records = []
    with progress(round(sum(map(cost, layers)) / 1e9, 3), "verify", "Gflop", quiet=quiet) as bar:
        for view in layers:
            native, _ = analyse(source, view)
            theirs, _ = ww.analyse(source, view)
            records.append(compare_rows(native, theirs))
            bar.update(round(cost(view) / 1e9, 3))
    return pd.DataFrame.from_records(records, columns=compared_columns())


def compared_columns() -> list[str]:
    """The columns of `verify`."""
    pairs = [name for ours in ww.SAME for name in (ours, f"ww_{ours}")]
    return ["tensor", *pairs, "alpha_difference", "differ", "agrees", "note"]


def compare_rows(native: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Both sides of a matrix in one record."""
    row: dict[str, Any] = {"tensor": native["tensor"]}
    for name in ww.SAME:
        row[name], row[f"ww_{name}"] = float(native[name]), float(theirs[name])
    left_out = theirs["status"] == "skipped"
    apart = [] if left_out else [name for name in ww.SAME if differs(name, row[name], row[f"ww_{name}"])]
    row["alpha_difference"] = abs(row["alpha"] - row["ww_alpha"])
    row["differ"], row["agrees"] = ", ".join(apart), not apart
    row["note"] = theirs["reason"] or native["reason"]
    return row


def differs(name: str, ours: float, theirs: float) -> bool:
    """Whether a number of the two sides is further apart than its tolerance.

    Args:
        name: the column.
        ours: the native number.
        theirs: weightwatcher's number. A number of the fit that only one side has differs; a norm or entropy that does
            not exist (of a zero matrix) does not.
    """
    if np.isnan(ours) or np.isnan(theirs):
        return name in ww.OF_THE_FIT and np.isnan(ours) != np.isnan(theirs)
    return bool(abs(ours - theirs) > TOLERANCE[name] * max(1.0, abs(theirs)))

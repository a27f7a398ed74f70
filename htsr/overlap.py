"""How far the leading singular vectors of two models' matrices span the same spaces, matrix by matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from htsr.console import progress
from htsr.errors import BadInput, UsageError
from htsr.matrix_row import cost, slices
from htsr.model.layers import views
from htsr.model.open import open_source
from htsr.numerics.subspace import leading_vectors, overlap

if TYPE_CHECKING:
    from htsr.model.layers import LayerView
    from htsr.model.source import Source
    from htsr.scan_data import ScanData

COLUMNS = ("overlap_outputs", "overlap_inputs", "overlap_rank", "chance_outputs", "chance_inputs")


def open_scanned(result: ScanData, model: Any, *, allow_pickle: bool = False) -> Source:
    """Open the model that a scan was made of.

    Args:
        result: the scan.
        model: the model, as `htsr.scan` takes it.
        allow_pickle: accepts pickled weights.

    Raises:
        BadInput: the weights are not those that were scanned.
    """
    source = open_source(model, allow_pickle=allow_pickle)
    scanned = result.provenance.get("model", {}).get("weights_sha256")
    if scanned != source.weights_sha256():
        name = result.provenance.get("model", {}).get("id")
        raise BadInput(f"{source.id}: got other weights than the scan of {name} was made of, expected the same model")
    return source


def overlaps(a: Source, b: Source, *, rank: int = 10, quiet: bool = True) -> pd.DataFrame:
    """Compare the leading singular vectors of every matrix that two models have in common.

    Args:
        a: the first model.
        b: the second model.
        rank: number of singular vectors that span a space, at least 1.
        quiet: shows no progress bar.

    Returns:
        A row for every common matrix, under (block, role), or (-1, name) outside the blocks. `overlap_outputs` and
        `overlap_inputs` are `htsr.numerics.subspace.overlap` of the spaces of the left and right singular vectors (of W
        as y = W x), NaN where that side differs in size; `overlap_rank` is the number of vectors; `chance_outputs` and
        `chance_inputs` are the overlap of random spaces.

    Raises:
        UsageError: the rank is below 1.
    """
    if rank < 1:
        raise UsageError(f"rank: got {rank}, expected at least 1")
    theirs = {key(view): view for view in views(b) if usable(view)}
    pairs = [(view, theirs[key(view)]) for view in views(a) if usable(view) and key(view) in theirs]
    records, index = [], []
    with progress(round(sum(cost(v) for pair in pairs for v in pair) / 1e9, 3), "overlap", "Gflop", quiet=quiet) as bar:
        for one, other in pairs:
            records.append(compare_spaces(spaces(a, one, rank), spaces(b, other, rank)))
            index.append(key(one))
            bar.update(round((cost(one) + cost(other)) / 1e9, 3))
    return pd.DataFrame.from_records(
        records, columns=list(COLUMNS), index=pd.MultiIndex.from_tuples(index, names=["block", "role"])
    )


def key(view: LayerView) -> tuple[int, str]:
    """The key under which matrices of two models are compared."""
    return (-1, view.tensor) if view.block is None else (view.block, view.role)


def usable(view: LayerView) -> bool:
    """Whether a view is one matrix that can be read."""
    return not view.reason and not view.pool


def spaces(source: Source, view: LayerView, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Bases of the leading output and input directions of a matrix; empty ones where it holds a NaN."""
    try:
        longer, shorter = leading_vectors(lambda: slices(source, view), min(view.rows, view.cols), rank)
    except BadInput:
        return np.zeros((view.rows, 0)), np.zeros((view.cols, 0))
    left, right = (longer, shorter) if view.rows >= view.cols else (shorter, longer)
    return (right, left) if view.transposed else (left, right)


def compare_spaces(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float, int, float, float]:
    """The COLUMNS of two matrices from their spaces of outputs and inputs."""
    shared = [overlap(x, y) if len(x) == len(y) else np.nan for x, y in zip(a, b, strict=True)]
    sizes = [max(x.shape[1], y.shape[1]) / len(x) if len(x) == len(y) else np.nan for x, y in zip(a, b, strict=True)]
    return shared[0], shared[1], min(a[0].shape[1], b[0].shape[1]), sizes[0], sizes[1]

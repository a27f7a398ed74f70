"""Do two models look in the same directions? Overlap of the leading singular vectors of their matrices, one by one."""

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
    """The model that a scan was made of.

    Raises BadInput when the weights are not those that were scanned.
    """
    source = open_source(model, allow_pickle=allow_pickle)
    scanned = result.provenance.get("model", {}).get("weights_sha256")
    if scanned != source.weights_sha256():
        name = result.provenance.get("model", {}).get("id")
        raise BadInput(f"{source.id}: got other weights than the scan of {name} was made of, expected the same model")
    return source


def overlaps(a: Source, b: Source, *, rank: int = 10, quiet: bool = True) -> pd.DataFrame:
    """A row for every matrix that both have, under (block, role), or (-1, name) outside the blocks.

    overlap_outputs and overlap_inputs: `htsr.numerics.subspace.overlap` of the spaces of the `rank` leading left and
    right singular vectors (of W as y = W x); overlap_rank: how many there are; chance_*: what random spaces have.
    Where one side of the matrices differs in size, its overlap is NaN. Memory is that of one matrix's Gram matrix.

    Raises:
        UsageError: a rank below 1.
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
    """What a matrix of one model and one of another meet by."""
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

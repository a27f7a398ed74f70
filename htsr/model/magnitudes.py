"""Outlying weights by magnitude alone, read with NumPy a slice at a time: a scan without text needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.model.reading import read_slice
from htsr.numerics.spectrum import MatrixSlice
from htsr.taus import tau_column
from htsr.workers import run

if TYPE_CHECKING:
    from htsr.model.layers import LayerView
    from htsr.model.source import Source

SLICE_ELEMENTS = 1 << 20
KEPT_ELEMENTS = 1 << 23  # of a block, by each worker


def weight_lod(
    source: Source, views: Sequence[LayerView], taus: Sequence[float], scope: str, workers: int | None = 1
) -> dict[str, dict[str, float]]:
    """Count outlying weights by magnitude alone, for every matrix inside a block.

    Args:
        source: an open model.
        views: its matrices.
        taus: the outlier limits; an outlier has |W| > tau * mean|W|.
        scope: `block` takes the mean over the block, `matrix` over the matrix. Parts of a fused matrix count against
            the block's mean and not towards it, since they are in it already.
        workers: number of threads; None uses every core that the process may use.

    Returns:
        tensor name -> column (`lod_weight`, and those of `htsr.taus` for further taus) -> percent; NaN where a weight
        is.
    """
    columns = ["lod_weight", *(tau_column("lod_weight", tau) for tau in taus[1:])]
    blocks: dict[int, list[LayerView]] = {}
    for view in views:
        if view.block is not None and not view.reason and not view.pool:
            blocks.setdefault(view.block, []).append(view)
    pools = [pool for m in blocks.values() for pool in ([m] if scope == "block" else [[view] for view in m])]
    result: dict[str, dict[str, float]] = {}
    for _, found in run(lambda pool: _pool_shares(source, pool, taus), pools, lambda _: 0, workers):
        result |= {tensor: dict(zip(columns, shares, strict=True)) for tensor, shares in found.items()}
    return result


def _pool_shares(source: Source, pool: Sequence[LayerView], taus: Sequence[float]) -> dict[str, list[float]]:
    """One share a tau of matrices that have one mean, which are read twice where they are too large to be kept."""
    size = sum(view.rows * view.cols for view in pool)
    kept = {view.tensor: list(_sizes(source, view)) for view in pool} if size <= KEPT_ELEMENTS else None

    def sizes(view: LayerView) -> Iterable[np.ndarray]:
        return _sizes(source, view) if kept is None else kept[view.tensor]

    counted = [view for view in pool if not view.part_of] or pool
    total = sum(float(part.sum(dtype=np.float64)) for view in counted for part in sizes(view))
    mean = total / sum(view.rows * view.cols for view in counted)
    limits = [tau * mean for tau in taus]
    return {view.tensor: _percents_above(sizes(view), view.rows * view.cols, limits) for view in pool}


def _percents_above(sizes: Iterable[np.ndarray], count: int, limits: Sequence[float]) -> list[float]:
    if not np.isfinite(limits).all():
        return [np.nan] * len(limits)
    counts = np.zeros(len(limits))
    for part in sizes:
        counts += [np.count_nonzero(part > _at_most(limit, part.dtype)) for limit in limits]
    return [float(share) for share in 100.0 * counts / count]


def _at_most(limit: float, dtype: np.dtype) -> Any:
    """The largest number of a float type up to `limit`: what is above one is above the other, without a conversion."""
    rounded = np.asarray(limit).astype(dtype)[()]
    return np.nextafter(rounded, rounded.dtype.type(-np.inf)) if float(rounded) > limit else rounded


def _sizes(source: Source, view: LayerView) -> Iterator[np.ndarray]:
    """|W|, some rows at a time."""
    step = max(SLICE_ELEMENTS // view.cols, 1)
    for start in range(0, view.rows, step):
        yield np.abs(read_slice(source, view, MatrixSlice(start, min(start + step, view.rows))))

"""Outlying weights by magnitude alone, read with NumPy a slice at a time: a scan without text needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.model.parts import read_block
from htsr.numerics.spectrum import Block
from htsr.workers import run

if TYPE_CHECKING:
    from htsr.model.layers import LayerView
    from htsr.model.source import Source

SLICE_ELEMENTS = 1 << 20
KEPT_ELEMENTS = 1 << 23  # of a block, by each worker


def weight_lod(
    source: Source, views: Sequence[LayerView], tau: float, scope: str, workers: int | None = 1
) -> dict[str, float]:
    """tensor name -> 100 * share of |W| > tau * mean|W|, for every matrix inside a block; NaN for NaN weights.

    The mean is the block's under scope `block` and the matrix's own under `matrix`. The parts of a fused matrix count
    against the block's mean and not towards it: they are in it already.
    """
    blocks: dict[int, list[LayerView]] = {}
    for view in views:
        if view.block is not None and not view.reason and not view.pool:
            blocks.setdefault(view.block, []).append(view)
    pools = [pool for m in blocks.values() for pool in ([m] if scope == "block" else [[view] for view in m])]
    result: dict[str, float] = {}
    for _, found in run(lambda pool: _pool_lod(source, pool, tau), pools, lambda _: 0, workers):
        result |= found
    return result


def _pool_lod(source: Source, pool: Sequence[LayerView], tau: float) -> dict[str, float]:
    """The shares of matrices that have one mean, which are read twice where they are too large to be kept."""
    size = sum(view.rows * view.cols for view in pool)
    kept = {view.tensor: list(_parts(source, view)) for view in pool} if size <= KEPT_ELEMENTS else None

    def parts(view: LayerView) -> Iterable[np.ndarray]:
        return _parts(source, view) if kept is None else kept[view.tensor]

    whole = [view for view in pool if not view.part_of] or pool
    total = sum(float(np.abs(part).sum(dtype=np.float64)) for view in whole for part in parts(view))
    limit = tau * total / sum(view.rows * view.cols for view in whole)
    return {view.tensor: _percent_above(parts(view), view.rows * view.cols, limit) for view in pool}


def _percent_above(parts: Iterable[np.ndarray], size: int, limit: float) -> float:
    if not np.isfinite(limit):
        return np.nan
    count = sum(int(np.count_nonzero(np.abs(part) > _at_most(limit, part.dtype))) for part in parts)
    return 100.0 * count / size


def _at_most(limit: float, dtype: np.dtype) -> Any:
    """The largest number of a float type up to `limit`: what is above one is above the other, without a conversion."""
    rounded = np.asarray(limit).astype(dtype)[()]
    return np.nextafter(rounded, rounded.dtype.type(-np.inf)) if float(rounded) > limit else rounded


def _parts(source: Source, view: LayerView) -> Iterator[np.ndarray]:
    step = max(SLICE_ELEMENTS // view.cols, 1)
    for start in range(0, view.rows, step):
        yield read_block(source, view, Block(axis=0, start=start, stop=min(start + step, view.rows)))

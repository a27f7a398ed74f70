"""Layer outlier distribution (LOD): which share of a layer's weights matters far more than the layer's mean weight.

The importance of weight W_ij is A_ij = |W_ij| * n_j with n_j the norm of input feature j over the calibration tokens
(n_j = 1 gives the weight-only variant, a different quantity with another name). Over matrices that are pooled,

    LOD = 100 * #{A > tau * mean(A)} / numel(A)        in percent, strictly above, one mean for the pool.

A is never held: its sum is sum_j n_j * sum_i |W_ij|, and the count goes over W in slices.

Reference: Yin et al. 2024 (OWL), section 3; Li et al. 2024 (OwLore) use tau = 13 and pool a decoder block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SLICE_ELEMENTS = 1 << 20  # 8 MB as float64: stays in cache, and a few of them are nothing beside a matrix


@dataclass(frozen=True, kw_only=True)
class OutlierSum:
    """Sum of the importances of one matrix and their number: what the mean of a pool needs."""

    total: float
    numel: int


def importance_sum(slices: Iterable[Tensor], norms: Tensor | None = None) -> OutlierSum:
    """Sum of |W_ij| * n_j over the row slices of one matrix (out x in), in float64.

    Args:
        slices: row slices (rows, in) of W that together cover it once; any dtype.
        norms: n_j, shape (in,); None stands for ones.
    """
    total, numel = 0.0, 0
    for part in _pieces(slices):
        columns = part.abs().sum(dim=0, dtype=torch.float64)
        total += float(columns.sum() if norms is None else columns @ norms.to(columns))
        numel += part.numel()
    return OutlierSum(total=total, numel=numel)


def count_above(slices: Iterable[Tensor], limits: Sequence[float], norms: Tensor | None = None) -> NDArray[np.int64]:
    """Number of importances strictly above each of `limits`; arguments as `importance_sum`, compared in float64."""
    counts = np.zeros(len(limits), dtype=np.int64)
    for part in _pieces(slices):
        importance = part.abs().to(torch.float64)
        if norms is not None:
            importance.mul_(norms.to(importance))
        counts += [int((importance > limit).sum()) for limit in limits]
    return counts


def pool_limits(sums: Sequence[OutlierSum], taus: Sequence[float]) -> list[float]:
    """tau * mean of the pooled importances, one limit a tau."""
    mean = sum(s.total for s in sums) / sum(s.numel for s in sums)
    return [tau * mean for tau in taus]


def percent(count: int, numel: int, limit: float) -> float:
    """The share in percent; NaN where the limit is not finite, since nothing can be compared with it."""
    return 100.0 * count / numel if np.isfinite(limit) else float("nan")


def _pieces(slices: Iterable[Tensor]) -> Iterator[Tensor]:
    for part in slices:
        if part.ndim != 2:
            raise ValueError(f"slices: got shape {tuple(part.shape)}, expected rows of a matrix (rows, in)")
        yield from part.split(max(1, SLICE_ELEMENTS // max(1, part.shape[1])))

"""Layer outlier distribution (LOD): which share of a layer's weights matters far more than the layer's mean weight.

The importance of weight W_ij is A_ij = |W_ij| * n_j with n_j the norm of input feature j over the calibration tokens
(n_j = 1 gives the weight-only variant, a different quantity with another name). Over matrices that are pooled,

    LOD = 100 * #{A > tau * mean(A)} / numel(A)        in percent, strictly above, one mean for the pool.

A is never held: its sum is sum_j n_j * sum_i |W_ij|, and A_ij is above a limit where |W_ij| is above a threshold of
column j. So the columns are summed once and the entries compared once, whatever the number of norms and of taus.

Reference: Yin et al. 2024 (OWL), section 3; Li et al. 2024 (OwLore) use tau = 13 and pool a decoder block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SLICE_ELEMENTS = 1 << 18  # 1 MB as float32, 2 MB as float64: stays in cache


def column_sums(W: Tensor) -> Tensor:
    """sum_i |W_ij| of a matrix (out, in); shape (in,), float64."""
    parts = [part.abs().to(torch.float64).sum(dim=0) for part in _row_slices(W)]
    return torch.stack(parts).sum(dim=0)


def thresholds(limit: float, norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a limit on importances into one on the weights of each column.

    Args:
        limit: an importance |w| * n_j above it is an outlier.
        norms: the norm n_j of each input feature, at least 0, shape (in,).
        dtype: the float type of the weights that are compared.

    Returns:
        The largest number t_j of `dtype` with t_j * n_j <= limit in float64, shape (in,). So for a weight w of that
        dtype |w| > t_j is |w| * n_j > limit computed in float64, ties included. A column with n_j = 0 has t_j =
        infinity.
    """
    n = norms.to(torch.float64)
    t = (limit / n).to(dtype)
    below, infinite = torch.full_like(t, -torch.inf), torch.full_like(t, torch.inf)
    t = torch.where(t.to(n) * n > limit, torch.nextafter(t, below), t)  # a quotient is rounded, to either side
    above = torch.nextafter(t, infinite)
    t = torch.where(above.to(n) * n <= limit, above, t)
    return torch.where(n == 0, infinite, t)


def count_above(W: Tensor, levels: Sequence[Tensor]) -> NDArray[np.int64]:
    """Count the |W_ij| strictly above t_j, for each row of thresholds t (in,) in `levels`, in one pass over W."""
    counts = np.zeros(len(levels), dtype=np.int64)
    for part in _row_slices(W):
        sizes = part.abs().to(levels[0].dtype)
        counts += [int(torch.count_nonzero(sizes > t)) for t in levels]
    return counts


def compared_in(weights: Tensor) -> torch.dtype:
    """The dtype that holds these weights exactly and is compared in: float64 for float64, else float32."""
    return torch.float64 if weights.dtype == torch.float64 else torch.float32


def percent(count: int, numel: int, limit: float) -> float:
    """The share in percent; NaN where the limit is not finite, since nothing can be compared with it."""
    return 100.0 * count / numel if np.isfinite(limit) else float("nan")


def _row_slices(W: Tensor) -> Sequence[Tensor]:
    if W.ndim != 2:
        raise ValueError(f"weights: got shape {tuple(W.shape)}, expected a matrix (out, in)")
    return W.split(max(1, SLICE_ELEMENTS // max(1, W.shape[1])))

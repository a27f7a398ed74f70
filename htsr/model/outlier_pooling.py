"""The outliers of one measured block and of its matrices: at every tau, by weights alone, and by halves of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from htsr.model.layers import views
from htsr.numerics.outliers import column_sums, compared_in, count_above, percent, thresholds
from htsr.taus import further_columns

if TYPE_CHECKING:
    from htsr.model.meters import MeasuredBlock
    from htsr.model.source import Source

Shares = Mapping[tuple[int, str], Sequence[tuple[str, np.ndarray]]]
Levels = Sequence[tuple[int, float]]  # (whose norms, tau)
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Percent of outlying weights of a block or a matrix; NaN where not computed.

    Attributes:
        lod: at the first tau, weighed by input norms.
        lod_weight: at the first tau, by weights alone.
        further: column name -> the same at each other tau.
        halves: `lod` with the norms of the first half of the windows and of the second; of a block only.
    """

    lod: float
    lod_weight: float
    further: Mapping[str, float] = field(default_factory=dict)
    halves: tuple[float, float] = (np.nan, np.nan)

    @property
    def columns(self) -> dict[str, float]:
        """Column name -> percent, at every tau."""
        return {"lod": self.lod, "lod_weight": self.lod_weight, **self.further}


ALL, ALONE, FIRST, SECOND = range(4)  # whose norms: of all windows, ones, of the first half, of the second half


@dataclass(frozen=True)
class _Member:
    """A matrix (out, in) of a pool, its four rows of norms (4, in) and the sums of its columns' |W_ij| (in,)."""

    role: str
    weight: Tensor
    norms: Tensor
    sums: Tensor


def fused_shares(source: Source) -> Shares:
    """(block, role) of a fused matrix -> role and outputs of each of its parts."""
    layers = views(source)
    roles = {(view.block, view.tensor): view.role for view in layers}
    shares: dict[tuple[int, str], list[tuple[str, np.ndarray]]] = {}
    for view in layers:
        if view.part is not None and view.part_of and view.block is not None:
            outputs = view.part.cols if view.transposed else view.part.rows
            shares.setdefault((view.block, roles[view.block, view.part_of]), []).append((view.role, outputs.indices()))
    return shares


def block_outliers(
    measured: MeasuredBlock, taus: Sequence[float], scope: str = "block", shares: Shares | None = None
) -> tuple[Outliers, dict[str, Outliers]]:
    """Count the outliers of a block and of its matrices.

    Args:
        measured: the block's linear maps and their input norms.
        taus: the outlier limits.
        scope: under `block` one limit holds for all matrices. Under `matrix` each has its own, and the block's LOD is
            the share of all its weights above theirs.
        shares: the parts of fused matrices, see `fused_shares`. They are weights of the matrices once more: they count
            against the block's limit and not towards it.

    Returns:
        The outliers of the block, and those of its matrices and parts by role.
    """
    if not measured.maps:
        return Outliers(lod=np.nan, lod_weight=np.nan, further=dict.fromkeys(further_columns(taus), np.nan)), {}
    levels = [(whose, tau) for tau in taus for whose in (ALL, ALONE)] + [(FIRST, taus[0]), (SECOND, taus[0])]
    members = [_member(m.role, m.weight, m.square_sums) for m in measured.maps]
    parts = [
        _member(role, m.weight[torch.from_numpy(outputs).to(m.weight.device)], m.square_sums)
        for m in measured.maps
        for role, outputs in (shares or {}).get((measured.index, m.role), ())
    ]
    pooled, every = _limits(members, levels), [*members, *parts]
    limits = [pooled if scope == "block" else _limits([member], levels) for member in every]
    counts = [_counts(member, levels, limit) for member, limit in zip(every, limits, strict=True)]
    sizes = [member.weight.numel() for member in every]
    each = [_outliers(*found, taus) for found in zip(counts, sizes, limits, strict=True)]
    n = len(members)
    block = _outliers(np.sum(counts[:n], axis=0), sum(sizes[:n]), np.sum(limits[:n], axis=0), taus)
    return block, {member.role: outliers for member, outliers in zip(every, each, strict=True)}


def _member(role: str, weight: Tensor, square_sums: Tensor) -> _Member:
    halves = square_sums.to(torch.float64)
    norms = torch.stack([halves.sum(dim=0), torch.ones_like(halves[0]), *halves]).sqrt()
    return _Member(role, weight, norms, column_sums(weight))


def _limits(pool: Sequence[_Member], levels: Levels) -> Floats:
    """tau * mean of the pool's importances at each level."""
    totals = np.sum([(m.norms @ m.sums).cpu().numpy() for m in pool], axis=0)
    means = totals / sum(m.weight.numel() for m in pool)
    return np.array([tau * means[whose] for whose, tau in levels])


def _counts(member: _Member, levels: Levels, limits: Floats) -> NDArray[np.int64]:
    """How many of a matrix's weights are above each level's limit."""
    dtype = compared_in(member.weight)
    columns = [thresholds(limit, member.norms[whose], dtype) for (whose, _), limit in zip(levels, limits, strict=True)]
    return count_above(member.weight, columns)


def _outliers(counts: NDArray[np.int64], size: int, limits: Floats, taus: Sequence[float]) -> Outliers:
    *numbers, first, second = (percent(int(c), size, limit) for c, limit in zip(counts, limits, strict=True))
    lod, lod_weight, *further = numbers
    return Outliers(
        lod=lod,
        lod_weight=lod_weight,
        further=dict(zip(further_columns(taus), further, strict=True)),
        halves=(first, second),
    )

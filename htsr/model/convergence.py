"""Whether the text was long enough: LOD by the first half of the windows against LOD by the second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """How far the blocks' LOD differs between two halves of the text.

    Attributes:
        windows: number of windows in each half.
        spearman: rank correlation of the two over the blocks, in [-1, 1]; NaN for fewer than three known blocks.
        largest_change: the largest difference of the two relative to their mean; NaN where no block has outliers.
        block: the block with the largest difference; None where no block has outliers.
    """

    windows: tuple[int, int]
    spearman: float
    largest_change: float
    block: int | None

    def record(self) -> dict[str, Any]:
        """The part that scan.json and a layer table store; null stands for NaN."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def convergence(halves: Sequence[tuple[float, float]], windows: int) -> Convergence | None:
    """Compare the LOD of the blocks by the two halves of the windows.

    The change between halves is larger than the error of the full text: each has half the text, and both err.

    Args:
        halves: LOD of each block by the first and by the second half, in percent, in order of depth.
        windows: number of windows in all.

    Returns:
        The comparison; None for a single window.
    """
    if windows < 2:
        return None
    first, second = np.asarray(halves, dtype=np.float64).reshape(-1, 2).T
    mean = (first + second) / 2
    change = np.abs(first - second) / np.where(mean > 0, mean, np.nan)
    known = np.isfinite(change)
    block = int(np.nanargmax(change)) if known.any() else None
    return Convergence(
        windows=(windows - windows // 2, windows // 2),
        spearman=rank_correlation(first, second),
        largest_change=float(change[block]) if block is not None else float("nan"),
        block=block,
    )


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's correlation of two columns where both are known; NaN for fewer than three or equal numbers."""
    known = np.isfinite(a) & np.isfinite(b)
    x, y = (_ranks(np.asarray(values, dtype=np.float64)[known]) for values in (a, b))
    if len(x) < 3 or not (np.ptp(x) and np.ptp(y)):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0, ties their mean."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") - 1) / 2

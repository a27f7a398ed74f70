"""How much the blocks of a matrix matter: means over blocks of |G|, G or G^2, in fp64.

Reference: Sparse Matrix Tuning (arXiv 2405.15525), section 3: blocks are scored by the mean of the absolute gradient.
Its published code takes the absolute value of the mean instead; both are here, and the mean square (the diagonal of
the empirical Fisher information).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from owlore.kernels.block_sparse import grid_of


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """`prepare` changes a gradient in place before its blocks are averaged; `finish` turns their sum into scores."""

    prepare: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]
    meaning: str


CRITERIA = {
    "mean_of_abs": Criterion(prepare=torch.abs_, finish=lambda s: s, meaning="mean |g| of each batch"),
    "abs_of_mean": Criterion(prepare=lambda g: g, finish=torch.abs, meaning="|mean g| over all batches"),
    "mean_square": Criterion(prepare=lambda g: g.mul_(g), finish=lambda s: s, meaning="mean g^2 of each batch"),
}


def block_means(matrix: Tensor, block: int) -> Tensor:
    """Mean of every block of a matrix (m x n), fp64, on the grid of `grid_of`; smaller blocks over what they have."""
    m, n = matrix.shape
    means = torch.empty(grid_of((m, n), block), dtype=torch.float64, device=matrix.device)
    for top, height in _bands(m, block):
        for left, width in _bands(n, block):
            rows = (m - top) // height if height == block else 1
            cols = (n - left) // width if width == block else 1
            region = matrix[top : top + rows * height, left : left + cols * width]
            view = region.unflatten(1, (cols, width)).unflatten(0, (rows, height))
            i, j = top // block, left // block
            means[i : i + rows, j : j + cols] = view.sum((1, 3), dtype=torch.float64) / (height * width)
    return means


def _bands(side: int, block: int) -> list[tuple[int, int]]:
    """(start, height) of the run of whole blocks and of the smaller one behind it, those that exist."""
    whole = side // block * block
    return [(start, size) for start, size in ((0, block if whole else 0), (whole, side - whole)) if size]

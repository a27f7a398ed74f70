"""Scores of the blocks of a gradient: means over each block of |G|, G or G^2, in fp64.

Reference: Sparse Matrix Tuning (arXiv 2405.15525), section 3: blocks are scored by the mean of the absolute gradient.
Its published code takes the absolute value of the mean instead. Both are here, and the mean square (the diagonal of
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
    """How block means become scores.

    Attributes:
        prepare: Changes a batch's gradient in place before its blocks are averaged.
        finish: Turns the mean over the batches (fp64) into scores.
    """

    prepare: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]


CRITERIA = {
    "mean_of_abs": Criterion(prepare=torch.abs_, finish=lambda s: s),  # mean |g| of each batch
    "abs_of_mean": Criterion(prepare=lambda g: g, finish=torch.abs),  # |mean g| over all batches
    "mean_square": Criterion(prepare=lambda g: g.mul_(g), finish=lambda s: s),  # mean g^2 of each batch
}


def block_means(matrix: Tensor, block: int) -> Tensor:
    """Mean of every block of a matrix (m x n), fp64, on the grid of `grid_of`; an edge block counts its own entries."""
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
    """(start, height) of the full-size blocks and of the smaller block after them, each only if it exists."""
    covered = side // block * block
    return [(start, size) for start, size in ((0, block if covered else 0), (covered, side - covered)) if size]

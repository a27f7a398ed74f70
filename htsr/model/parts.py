"""Matrices inside a tensor: an expert of a stack, a share of a fused projection, a slice of a convolution's kernel.

A tensor of any number of dimensions is seen as one matrix (`flat_shape`), and a part is a regular choice of its rows
and of its columns. So a part is read from the file a slice at a time, like a matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Positions along a dimension, in runs at a regular distance.

    Attributes:
        start: the first position.
        width: number of neighbouring positions in a run.
        stride: distance between the starts of two runs.
        count: number of runs.
    """

    start: int
    width: int
    stride: int
    count: int

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.width * self.count

    def pieces(self, first: int, last: int) -> list[tuple[int, int]]:
        """The stretches of the dimension that hold chosen positions `first` to `last` (counted among the chosen)."""
        found = []
        while first < last:
            run, offset = divmod(first, self.width)
            length = min(self.width - offset, last - first)
            begin = self.start + run * self.stride + offset
            found.append((begin, begin + length))
            first += length
        return found

    def indices(self) -> np.ndarray:
        """All chosen positions, ascending."""
        first = self.start + self.stride * np.arange(self.count)
        return (first[:, None] + np.arange(self.width)).ravel()


def run(start: int, width: int) -> Runs:
    """One stretch."""
    return Runs(start=start, width=width, stride=width, count=1)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The chosen rows and columns of the stored tensor `tensor`, seen as a matrix."""

    tensor: str
    rows: Runs
    cols: Runs


def flat_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as a matrix: a stack's matrices one below the other, a kernel with a row an output channel."""
    if len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def kernel_parts(tensor: str, shape: tuple[int, ...]) -> list[Part]:
    """The k*k matrices (out, in) of a convolution's kernel (out, in, k, k)."""
    rows, inner, size = shape[0], shape[1], math.prod(shape[2:])
    return [
        Part(tensor=tensor, rows=run(0, rows), cols=Runs(start=i, width=1, stride=size, count=inner))
        for i in range(size)
    ]

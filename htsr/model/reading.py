"""Reading a matrix of a model a block of rows or columns at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from htsr.model.parts import Part
from htsr.numerics.spectrum import MatrixSlice

if TYPE_CHECKING:
    from htsr.model.layers import LayerView
    from htsr.model.source import Source

WINDOW_ELEMENTS = 1 << 21  # what is read at once where only some of the columns are wanted


def read_slice(source: Source, view: LayerView, block: MatrixSlice) -> np.ndarray:
    """Rows or columns of the matrix that a view stands for."""
    if view.part is None:
        return source.array(view.tensor, block)
    return read_part(source, view.part, block)


def read_part(source: Source, part: Part, block: MatrixSlice) -> np.ndarray:
    """Rows or columns (`block.axis` 0 or 1) of a part, a C-contiguous array."""
    rows, cols = block.window(part.rows.size, part.cols.size)
    strips = [_columns(source, part, stretch, cols) for stretch in part.rows.pieces(*rows)]
    return strips[0] if len(strips) == 1 else np.concatenate(strips)


def _columns(source: Source, part: Part, rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
    """Stored rows of a part, its chosen columns `cols`: read with what lies between them, a few rows at a time."""
    stretches = part.cols.pieces(*cols)
    low, high = stretches[0][0], stretches[-1][1]
    if len(stretches) == 1:
        return source.window(part.tensor, rows, (low, high))
    wanted = np.concatenate([np.arange(begin, end) for begin, end in stretches]) - low
    step = max(WINDOW_ELEMENTS // (high - low), 1)
    windows = [(r, min(r + step, rows[1])) for r in range(rows[0], rows[1], step)]
    return np.concatenate([source.window(part.tensor, window, (low, high))[:, wanted] for window in windows])


def thin_factors(source: Source, view: LayerView) -> tuple[np.ndarray, np.ndarray] | None:
    """B (rows, r) and A (r, cols) of a view whose tensor is their product, None where it is not."""
    found = source.factors(view.stored)
    if found is None or view.part is None:
        return found
    B, A = found
    return B[view.part.rows.indices()], A[:, view.part.cols.indices()]

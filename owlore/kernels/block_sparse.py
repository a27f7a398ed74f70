"""Chosen blocks of a weight: reading, writing, their gradients, and their product with an input.

A weight W (m x n, y = W x) is cut into blocks of l x l; where l does not divide a side, the last blocks are smaller.
The values of the chosen blocks are stored in one flat vector: first the full blocks, then those at the right edge,
those at the bottom edge, and the corner; each kind is ordered by (i, j). So every kind is a (k, height, width) view of
the vector and no entry is padding.

Reference: Sparse Matrix Tuning (arXiv 2405.15525), section 3: dL/dD_b = g[:, R_b]^T x[:, C_b], dL/dx = g W'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Cell = tuple[int, int]
WORKSPACE = 1 << 24  # elements of gathered activations allocated at once


@dataclass(frozen=True, kw_only=True)
class Group:
    """The k chosen blocks of one size, which lie in one rectangular region of the weight.

    Attributes:
        height: Rows of each block.
        width: Columns of each block.
        top: First row of the region.
        left: First column of the region.
        grid: Number of blocks that the region is high and wide.
        start: Where the values begin in the flat vector; they take k * height * width entries.
        i: Row of each block in the region's grid, (k,) int64.
        j: Column of each block in the region's grid, (k,) int64.
        by_row: Positions of the blocks, split so that no i repeats within a part. Sums into a row of blocks then have
            no collisions, so that they are deterministic.
        by_col: The same for j.
    """

    height: int
    width: int
    top: int
    left: int
    grid: Cell
    start: int
    i: Tensor
    j: Tensor
    by_row: tuple[Tensor, ...]
    by_col: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Number of entries in the blocks."""
        return len(self.i) * self.height * self.width

    def of(self, flat: Tensor) -> Tensor:
        """(k, height, width): this group's values, a view of the flat vector."""
        return flat[self.start : self.start + self.size].view(-1, self.height, self.width)

    def blocks(self, matrix: Tensor) -> Tensor:
        """(grid[0], height, grid[1], width): the region of W, a view."""
        region = matrix[self.top : self.top + self.grid[0] * self.height]
        region = region[:, self.left : self.left + self.grid[1] * self.width]
        return region.unflatten(1, (self.grid[1], self.width)).unflatten(0, (self.grid[0], self.height))

    def outputs(self, y: Tensor) -> Tensor:
        """(T, grid[0], height): the region's outputs of (T, m), a view."""
        return y[:, self.top : self.top + self.grid[0] * self.height].unflatten(1, (self.grid[0], self.height))

    def inputs(self, x: Tensor) -> Tensor:
        """(T, grid[1], width): the region's inputs of (T, n), a view."""
        return x[:, self.left : self.left + self.grid[1] * self.width].unflatten(1, (self.grid[1], self.width))


@dataclass(frozen=True, kw_only=True)
class BlockIndex:
    """Where the chosen blocks of one weight lie.

    Attributes:
        shape: (outputs, inputs) of the weight.
        block: Side of a full block.
        cells: (i, j) of each block in the grid of `grid_of`, in the order of the flat vector.
        groups: The blocks by size, in the order of the flat vector.
    """

    shape: tuple[int, int]
    block: int
    cells: tuple[Cell, ...]
    groups: tuple[Group, ...]

    @property
    def size(self) -> int:
        """Number of entries in all chosen blocks."""
        return sum(group.size for group in self.groups)


def grid_of(shape: tuple[int, int], block: int) -> Cell:
    """(rows, columns) of the grid of blocks that covers a weight, smaller blocks at the edges included."""
    return -(-shape[0] // block), -(-shape[1] // block)


def make_layout(
    shape: tuple[int, int], block: int, cells: Iterable[Sequence[int]], device: torch.device | str = "cpu"
) -> BlockIndex:
    """The index of the blocks at these cells.

    Args:
        shape: (outputs, inputs) of the weight.
        block: Side of a full block.
        cells: (i, j) of each chosen block, in any order.
        device: Where the index tensors are put.

    Raises:
        ValueError: A cell lies outside the grid or is named twice.
    """
    (m, n), (high, wide) = shape, grid_of(shape, block)
    wanted = sorted((int(i), int(j)) for i, j in cells)
    outside = [c for c in wanted if not (0 <= c[0] < high and 0 <= c[1] < wide)]
    if outside or len(set(wanted)) != len(wanted):
        wrong = outside or [c for c, times in Counter(wanted).items() if times > 1]
        raise ValueError(
            f"block {wrong[0]} of a {m} x {n} weight in blocks of {block}: expected each cell once, "
            f"rows 0..{high - 1} and columns 0..{wide - 1}"
        )
    a, b = m // block, n // block  # full blocks
    kinds = {
        (block, block, 0, 0, (a, b)): [c for c in wanted if c[0] < a and c[1] < b],
        (block, n - b * block, 0, b, (a, 1)): [c for c in wanted if c[0] < a and c[1] >= b],
        (m - a * block, block, a, 0, (1, b)): [c for c in wanted if c[0] >= a and c[1] < b],
        (m - a * block, n - b * block, a, b, (1, 1)): [c for c in wanted if c[0] >= a and c[1] >= b],
    }
    groups: list[Group] = []
    start = 0
    for (height, width, first_i, first_j, grid), members in kinds.items():
        if not members:
            continue
        i, j = [c[0] - first_i for c in members], [c[1] - first_j for c in members]
        group = Group(
            height=height,
            width=width,
            top=first_i * block,
            left=first_j * block,
            grid=grid,
            start=start,
            i=torch.tensor(i, device=device),
            j=torch.tensor(j, device=device),
            by_row=_without_repeats(i, device),
            by_col=_without_repeats(j, device),
        )
        groups.append(group)
        start += group.size
    ordered = tuple(cell for members in kinds.values() for cell in members)
    return BlockIndex(shape=shape, block=block, cells=ordered, groups=tuple(groups))


def _without_repeats(values: list[int], device: torch.device | str) -> tuple[Tensor, ...]:
    """Positions of the values, split so that no value repeats within a part."""
    seen: Counter[int] = Counter()
    parts: list[list[int]] = []
    for position, value in enumerate(values):
        if seen[value] == len(parts):
            parts.append([])
        parts[seen[value]].append(position)
        seen[value] += 1
    return tuple(torch.tensor(members, device=device) for members in parts)


def read_blocks(matrix: Tensor, layout: BlockIndex) -> Tensor:
    """The chosen entries of W (m x n, any strides) as a flat vector of its dtype."""
    parts = [group.blocks(matrix)[group.i, :, group.j, :].flatten() for group in layout.groups]
    return torch.cat(parts) if parts else matrix.new_empty(0)


def write_blocks(matrix: Tensor, layout: BlockIndex, flat: Tensor) -> None:
    """Write the flat values into their blocks of W, rounded to its dtype; no other entry of W changes."""
    for group in layout.groups:
        group.blocks(matrix)[group.i, :, group.j, :] = group.of(flat).to(matrix.dtype)


def block_gradient(g: Tensor, x: Tensor, layout: BlockIndex) -> Tensor:
    """g[:, R_b]^T x[:, C_b] of every chosen block, flat; g is (T, m), x is (T, n)."""
    found = g.new_empty(layout.size)
    for group in layout.groups:
        blocks = group.of(found)
        size = _chunk_size(g.shape[0] * (group.height + group.width))
        for i, j, found_blocks in zip(group.i.split(size), group.j.split(size), blocks.split(size), strict=True):
            left = group.outputs(g).index_select(1, i).permute(1, 2, 0)  # (c, height, T)
            right = group.inputs(x).index_select(1, j).transpose(0, 1)  # (c, T, width)
            torch.bmm(left, right, out=found_blocks)
    return found


def add_product(y: Tensor, x: Tensor, layout: BlockIndex, flat: Tensor) -> None:
    """y[:, R_b] += x[:, C_b] D_b^T for every chosen block, in place; y is (T, m), x is (T, n), flat of their dtype."""
    for group in layout.groups:
        blocks = group.of(flat)
        for members in _chunks(group.by_row, y.shape[0] * (group.height + group.width)):
            right = group.inputs(x).index_select(1, group.j[members]).transpose(0, 1)  # (c, T, width)
            product = torch.bmm(right, blocks[members].transpose(1, 2))  # (c, T, height)
            group.outputs(y).index_add_(1, group.i[members], product.transpose(0, 1))


def add_transposed(gx: Tensor, g: Tensor, layout: BlockIndex, flat: Tensor) -> None:
    """gx[:, C_b] += g[:, R_b] D_b for every chosen block, in place: the input gradient of `add_product`."""
    for group in layout.groups:
        blocks = group.of(flat)
        for members in _chunks(group.by_col, g.shape[0] * (group.height + group.width)):
            left = group.outputs(g).index_select(1, group.i[members]).transpose(0, 1)  # (c, T, height)
            product = torch.bmm(left, blocks[members])  # (c, T, width)
            group.inputs(gx).index_add_(1, group.j[members], product.transpose(0, 1))


def _chunk_size(elements: int) -> int:
    """How many blocks are multiplied at once, when each gathers so many elements."""
    return max(1, WORKSPACE // max(1, elements))


def _chunks(parts: tuple[Tensor, ...], elements: int) -> Iterator[Tensor]:
    for members in parts:
        yield from members.split(_chunk_size(elements))


def written_linear(
    x: Tensor,
    dense: Callable[[Tensor], Tensor],
    matrix: Tensor,
    bias: Tensor | None,
    contents: Callable[[], Any],
    layouts: Sequence[BlockIndex],
    deltas: Sequence[Tensor],
) -> Tensor:
    """y = dense(x), where the weight already holds W0 + D; gradients go to x, the bias and each delta.

    The forward is the dense layer's, the input gradient g W' is dense too, and a delta gets the gradient of its blocks
    only. x and the weight (no copy) are saved for backward with `save_for_backward`.

    Args:
        x: Input, (..., n).
        dense: Computes the layer's output from x, bias included.
        matrix: The weight (m x n) with the blocks written into it.
        bias: The layer's bias (m), or None; it is only here to get its gradient.
        contents: Returns a value that identifies what is written in the weight. Backward compares it with the value at
            the forward, since autograd's version check does not see a write through `.data`.
        layouts: Where each delta's blocks lie.
        deltas: The trained values, flat.

    Returns:
        The layer's output, (..., m).

    Raises:
        RuntimeError: (in backward) The blocks were rewritten after the forward.
    """
    return _WrittenLinear.apply(x, matrix, bias, dense, contents, tuple(layouts), *deltas)


class _WrittenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        dense: Callable[[Tensor], Tensor],
        contents: Callable[[], Any],
        layouts: tuple[BlockIndex, ...],
        *deltas: Tensor,
    ) -> Tensor:
        y = dense(x)
        needs_blocks = any(ctx.needs_input_grad[6:])
        ctx.save_for_backward(x if needs_blocks else None, matrix if ctx.needs_input_grad[0] else None)
        ctx.layouts, ctx.contents, ctx.seen = layouts, contents, contents()
        ctx.x_like = (x.shape, x.dtype)
        ctx.dtypes = [delta.dtype for delta in deltas]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.contents() != ctx.seen:
            raise RuntimeError(
                "got a backward over a weight whose blocks were rewritten after the forward (an adapter was switched "
                "or a delta updated), expected the same contents: run backward first, or use mode='bypass'"
            )
        x, matrix = ctx.saved_tensors
        shape, dtype = ctx.x_like
        g = incoming.reshape(-1, incoming.shape[-1])
        gx = (g @ matrix.to(g.dtype)).view(shape).to(dtype) if ctx.needs_input_grad[0] else None
        gb = g.sum(0) if ctx.needs_input_grad[2] else None
        flat_x = x.reshape(-1, shape[-1]).to(g.dtype) if x is not None else None
        found: list[Tensor | None] = []
        for needed, layout, delta_dtype in zip(ctx.needs_input_grad[6:], ctx.layouts, ctx.dtypes, strict=True):
            found.append(block_gradient(g, flat_x, layout).to(delta_dtype) if needed and flat_x is not None else None)
        return gx, None, gb, None, None, None, *found


def block_product(x: Tensor, layout: BlockIndex, delta: Tensor) -> Tensor:
    """x D^T for the sparse D, (..., m) in x's dtype, to be added to the output of a base that cannot be written."""
    return _BlockProduct.apply(x, layout, delta)


class _BlockProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: BlockIndex, delta: Tensor) -> Tensor:
        flat_x = x.reshape(-1, x.shape[-1])
        y = x.new_zeros(flat_x.shape[0], layout.shape[0])
        add_product(y, flat_x, layout, delta.to(x.dtype))
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, delta if ctx.needs_input_grad[0] else None)
        ctx.layout, ctx.x_like, ctx.delta_dtype = layout, (x.shape, x.dtype), delta.dtype
        return y.view(*x.shape[:-1], layout.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        x, delta = ctx.saved_tensors
        shape, dtype = ctx.x_like
        g = incoming.reshape(-1, incoming.shape[-1])
        gx = gd = None
        if delta is not None:
            gx = g.new_zeros(g.shape[0], shape[-1])
            add_transposed(gx, g, ctx.layout, delta.to(g.dtype))
            gx = gx.view(shape).to(dtype)
        if x is not None:
            gd = block_gradient(g, x.reshape(-1, shape[-1]).to(g.dtype), ctx.layout).to(ctx.delta_dtype)
        return gx, None, gd

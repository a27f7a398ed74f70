"""Chosen blocks of a weight: reading, writing, their gradients, and their product with an input.

A weight W (m x n, y = W x) is cut into blocks of l x l; where l does not divide a side, the last blocks are smaller.
The values of the chosen blocks live in one flat vector: first the full blocks, then those at the right edge, those at
the bottom edge, the corner, each kind ordered by (i, j). So every kind is a (k, height, width) view of the vector and
no entry is padding.

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
WORKSPACE = 1 << 24  # elements of gathered activations alive at once


@dataclass(frozen=True, kw_only=True)
class Group:
    """Blocks of one size: cells (i, j) of the region that starts at (top, left) and is `grid` blocks high and wide.

    The values are `start` .. `start + k * height * width` of the flat vector. `by_row` and `by_col` split the k blocks
    into rounds without a repeated i (or j): sums into a row of blocks are then free of collisions, so deterministic.
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
        return len(self.i) * self.height * self.width

    def of(self, flat: Tensor) -> Tensor:
        """(k, height, width): this group's values, a view of the flat vector."""
        return flat[self.start : self.start + self.size].view(-1, self.height, self.width)

    def blocks(self, matrix: Tensor) -> Tensor:
        """(grid[0], height, grid[1], width): the region of W as a view."""
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
    """Where the chosen blocks of one weight lie; `cells` are in the order of the flat vector."""

    shape: tuple[int, int]
    block: int
    cells: tuple[Cell, ...]
    groups: tuple[Group, ...]

    @property
    def size(self) -> int:
        """Number of entries in all chosen blocks."""
        return sum(group.size for group in self.groups)


def grid_of(shape: tuple[int, int], block: int) -> Cell:
    """How many blocks a weight is high and wide, the smaller ones at the edges included."""
    return -(-shape[0] // block), -(-shape[1] // block)


def make_layout(
    shape: tuple[int, int], block: int, cells: Iterable[Sequence[int]], device: torch.device | str = "cpu"
) -> BlockIndex:
    """The layout of these cells, whatever their order.

    Raises: ValueError for a cell outside the grid or named twice.
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
            by_row=_rounds(i, device),
            by_col=_rounds(j, device),
        )
        groups.append(group)
        start += group.size
    ordered = tuple(cell for members in kinds.values() for cell in members)
    return BlockIndex(shape=shape, block=block, cells=ordered, groups=tuple(groups))


def _rounds(values: list[int], device: torch.device | str) -> tuple[Tensor, ...]:
    """Positions split so that no value repeats within a round."""
    seen: Counter[int] = Counter()
    rounds: list[list[int]] = []
    for position, value in enumerate(values):
        if seen[value] == len(rounds):
            rounds.append([])
        rounds[seen[value]].append(position)
        seen[value] += 1
    return tuple(torch.tensor(members, device=device) for members in rounds)


def read_blocks(matrix: Tensor, layout: BlockIndex) -> Tensor:
    """The chosen entries of W (m x n, any strides) as a flat vector of its dtype."""
    parts = [group.blocks(matrix)[group.i, :, group.j, :].flatten() for group in layout.groups]
    return torch.cat(parts) if parts else matrix.new_empty(0)


def write_blocks(matrix: Tensor, layout: BlockIndex, flat: Tensor) -> None:
    """Put the flat values in place in W, rounded to its dtype; nothing else of W is touched."""
    for group in layout.groups:
        group.blocks(matrix)[group.i, :, group.j, :] = group.of(flat).to(matrix.dtype)


def block_gradient(g: Tensor, x: Tensor, layout: BlockIndex) -> Tensor:
    """g[:, R_b]^T x[:, C_b] of every chosen block, flat; g is (T, m), x is (T, n)."""
    found = g.new_empty(layout.size)
    for group in layout.groups:
        blocks = group.of(found)
        for part in _chunks(len(group.i), g.shape[0] * (group.height + group.width)):
            left = group.outputs(g).index_select(1, group.i[part]).permute(1, 2, 0)  # (c, height, T)
            right = group.inputs(x).index_select(1, group.j[part]).transpose(0, 1)  # (c, T, width)
            torch.bmm(left, right, out=blocks[part])
    return found


def add_product(y: Tensor, x: Tensor, layout: BlockIndex, flat: Tensor) -> None:
    """y[:, R_b] += x[:, C_b] D_b^T for every chosen block, in place; y is (T, m), x is (T, n), flat of their dtype."""
    for group in layout.groups:
        blocks = group.of(flat)
        for members in _pieces(group.by_row, y.shape[0] * (group.height + group.width)):
            right = group.inputs(x).index_select(1, group.j[members]).transpose(0, 1)  # (c, T, width)
            product = torch.bmm(right, blocks[members].transpose(1, 2))  # (c, T, height)
            group.outputs(y).index_add_(1, group.i[members], product.transpose(0, 1))


def add_transposed(gx: Tensor, g: Tensor, layout: BlockIndex, flat: Tensor) -> None:
    """gx[:, C_b] += g[:, R_b] D_b for every chosen block, in place: the input gradient of `add_product`."""
    for group in layout.groups:
        blocks = group.of(flat)
        for members in _pieces(group.by_col, g.shape[0] * (group.height + group.width)):
            left = group.outputs(g).index_select(1, group.i[members]).transpose(0, 1)  # (c, T, height)
            product = torch.bmm(left, blocks[members])  # (c, T, width)
            group.inputs(gx).index_add_(1, group.j[members], product.transpose(0, 1))


def _chunks(count: int, elements: int) -> Iterator[slice]:
    size = max(1, WORKSPACE // max(1, elements))
    for start in range(0, count, size):
        yield slice(start, start + size)


def _pieces(rounds: tuple[Tensor, ...], elements: int) -> Iterator[Tensor]:
    for members in rounds:
        for part in _chunks(len(members), elements):
            yield members[part]


def written_linear(
    x: Tensor,
    dense: Callable[[Tensor], Tensor],
    matrix: Tensor,
    bias: Tensor | None,
    contents: Callable[[], Any],
    layouts: Sequence[BlockIndex],
    deltas: Sequence[Tensor],
) -> Tensor:
    """y = dense(x) where `matrix` (m x n) already holds W0 + D in place; gradients go to x, bias and each delta.

    The forward is the dense layer's own, the input gradient g W' is dense too, and a delta gets the gradient of its
    blocks alone. Saved for backward are x and the weight (no copy), through the usual hooks. `contents` tells what is
    written in the weight: backward refuses to run on other contents than the forward saw, since a write through
    `.data` is invisible to autograd's own check.
    """
    result: Tensor = _WrittenLinear.apply(x, matrix, bias, dense, contents, tuple(layouts), *deltas)
    return result


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
        for needed, layout, own in zip(ctx.needs_input_grad[6:], ctx.layouts, ctx.dtypes, strict=True):
            found.append(block_gradient(g, flat_x, layout).to(own) if needed and flat_x is not None else None)
        return gx, None, gb, None, None, None, *found


def block_product(x: Tensor, layout: BlockIndex, delta: Tensor) -> Tensor:
    """x D^T for the sparse D alone, (..., m) in x's dtype: what a bypass adds to a base that cannot be written."""
    result: Tensor = _BlockProduct.apply(x, layout, delta)
    return result


class _BlockProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: BlockIndex, delta: Tensor) -> Tensor:
        flat_x = x.reshape(-1, x.shape[-1])
        y = x.new_zeros(flat_x.shape[0], layout.shape[0])
        add_product(y, flat_x, layout, delta.to(x.dtype))
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, delta if ctx.needs_input_grad[0] else None)
        ctx.layout, ctx.x_like, ctx.own = layout, (x.shape, x.dtype), delta.dtype
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
            gd = block_gradient(g, x.reshape(-1, shape[-1]).to(g.dtype), ctx.layout).to(ctx.own)
        return gx, None, gd

"""Blocks of a weight: every product and gradient is the dense one restricted to the blocks."""

import pytest
import torch
from makers import generator

from owlore.kernels import block_sparse
from owlore.kernels.block_sparse import (
    block_gradient,
    block_product,
    grid_of,
    make_layout,
    read_blocks,
    write_blocks,
    written_linear,
)

CASES = {  # shape, block, cells: even, ragged on both sides, every cell, one cell, repeated rows and columns
    "even": ((16, 24), 8, [(0, 0), (1, 2)]),
    "ragged": ((19, 21), 8, [(2, 2), (0, 2), (2, 0), (1, 1), (0, 0), (1, 2)]),
    "all": ((19, 10), 8, [(i, j) for i in range(3) for j in range(2)]),
    "wider than the weight": ((5, 3), 8, [(0, 0)]),
    "a row and a column": ((16, 16), 4, [(1, 0), (1, 1), (1, 3), (0, 3), (2, 3)]),
}


def case(name, dtype=torch.float64):
    shape, block, cells = CASES[name]
    layout = make_layout(shape, block, cells)
    weight = torch.randn(shape, generator=generator(0), dtype=dtype)
    delta = torch.randn(layout.size, generator=generator(1), dtype=dtype)
    return layout, weight, delta


def mask_of(layout):
    mask = torch.zeros(layout.shape, dtype=torch.bool)
    for i, j in layout.cells:
        mask[i * layout.block : (i + 1) * layout.block, j * layout.block : (j + 1) * layout.block] = True
    return mask


def dense_delta(layout, flat):
    dense = torch.zeros(layout.shape, dtype=flat.dtype)
    write_blocks(dense, layout, flat)
    return dense


@pytest.mark.parametrize("name", CASES)
def test_the_flat_vector_holds_the_chosen_entries_and_nothing_else(name):
    layout, weight, delta = case(name)
    mask = mask_of(layout)
    assert layout.size == int(mask.sum())
    written = weight.clone()
    write_blocks(written, layout, delta)
    assert torch.equal(written[~mask], weight[~mask])
    assert torch.equal(read_blocks(written, layout), delta)
    assert torch.equal(read_blocks(written.T.contiguous().T, layout), delta)  # Conv1D's storage
    start = 0
    for i, j in layout.cells:  # block after block, row-major
        block = weight[i * layout.block : (i + 1) * layout.block, j * layout.block : (j + 1) * layout.block]
        assert torch.equal(read_blocks(weight, layout)[start : start + block.numel()], block.flatten())
        start += block.numel()


@pytest.mark.parametrize("workspace", [1 << 24, 64])
@pytest.mark.parametrize("name", CASES)
def test_block_gradients_are_the_dense_ones_restricted(monkeypatch, name, workspace):
    monkeypatch.setattr(block_sparse, "WORKSPACE", workspace)
    layout, *_ = case(name)
    x = torch.randn(30, layout.shape[1], generator=generator(2), dtype=torch.float64)
    g = torch.randn(30, layout.shape[0], generator=generator(3), dtype=torch.float64)
    difference = block_gradient(g, x, layout) - read_blocks(g.T @ x, layout)
    assert float(difference.abs().max()) < 1e-12


@pytest.mark.parametrize("lead", [(7,), (2, 7), (2, 1, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_written_layer_is_the_dense_layer(name, with_bias, lead):
    layout, weight, delta = case(name)
    x = torch.randn(*lead, layout.shape[1], generator=generator(2), dtype=torch.float64, requires_grad=True)
    bias = torch.randn(layout.shape[0], generator=generator(4), dtype=torch.float64) if with_bias else None
    delta.requires_grad_()
    weight += dense_delta(layout, delta.detach())

    def dense(inputs):
        return torch.nn.functional.linear(inputs, weight, bias)

    y = written_linear(x, dense, weight, bias, lambda: 0, [layout], [delta])
    assert torch.equal(y, dense(x))
    g = torch.randn(y.shape, generator=generator(5), dtype=torch.float64)
    gx, gd = torch.autograd.grad(y, [x, delta], g)
    full = weight.clone().requires_grad_()
    truth = torch.autograd.grad(torch.nn.functional.linear(x, full, bias), [x, full], g)
    assert float((gx - truth[0]).abs().max()) < 1e-12
    assert float((gd - read_blocks(truth[1], layout)).abs().max()) < 1e-12


@pytest.mark.parametrize("workspace", [1 << 24, 64])
@pytest.mark.parametrize("name", CASES)
def test_the_bypass_is_the_product_with_a_matrix_of_the_blocks_alone(monkeypatch, name, workspace):
    monkeypatch.setattr(block_sparse, "WORKSPACE", workspace)
    layout, _, delta = case(name)
    x = torch.randn(2, 6, layout.shape[1], generator=generator(2), dtype=torch.float64, requires_grad=True)
    delta.requires_grad_()
    y = block_product(x, layout, delta)
    truth = x.detach() @ dense_delta(layout, delta.detach()).T
    assert float((y.detach() - truth).abs().max()) < 1e-12
    torch.autograd.gradcheck(lambda a, d: block_product(a, layout, d), [x, delta])


def test_gradcheck_of_a_written_layer_with_a_frozen_delta_elsewhere():
    layout, weight, delta = case("ragged")
    other = make_layout(layout.shape, 8, [(1, 0)])
    fixed = torch.zeros(other.size, dtype=torch.float64)
    x = torch.randn(3, 4, layout.shape[1], generator=generator(2), dtype=torch.float64, requires_grad=True)
    bias = torch.randn(layout.shape[0], generator=generator(4), dtype=torch.float64, requires_grad=True)

    def layer(inputs, offset, values):
        matrix = weight + dense_delta(layout, values.detach())
        return written_linear(inputs, lambda a: torch.nn.functional.linear(a, matrix, offset), matrix, offset,
                              lambda: 0, [layout, other], [values, fixed])  # fmt: skip

    assert torch.autograd.gradcheck(layer, [x, bias, delta.requires_grad_()])


def test_backward_over_other_contents_than_the_forwards_is_refused():
    layout, weight, delta = case("even")
    x = torch.randn(3, 24, generator=generator(2), dtype=torch.float64, requires_grad=True)
    contents = ["first"]
    y = written_linear(x, lambda a: a @ weight.T, weight, None, lambda: tuple(contents), [layout], [delta])
    contents[0] = "second"
    with pytest.raises(RuntimeError, match="run backward first"):
        y.sum().backward()


def test_cells_outside_the_grid_or_named_twice_are_refused():
    assert grid_of((19, 21), 8) == (3, 3)
    with pytest.raises(ValueError, match=r"block \(3, 0\).*rows 0..2"):
        make_layout((19, 21), 8, [(3, 0)])
    with pytest.raises(ValueError, match="each cell once"):
        make_layout((19, 21), 8, [(1, 0), (1, 0)])

"""GaLore's projection: sides, orthonormality, captured energy, rotation of moments."""

import paper
import pytest
import torch
from makers import generator

from owlore.kernels import projector
from owlore.kernels.projector import (
    add_projected_back,
    basis_shape,
    find_basis,
    is_cheaper_in_products,
    project,
    project_back,
    project_product,
    projected_shape,
    projects_right,
    rotate_moments,
)

SHAPES = [(96, 40), (40, 96), (64, 64), (300, 200), (200, 300)]


def decaying(rows, cols, seed, power=1.0):
    """A matrix with singular values 1/k^power."""
    u = torch.linalg.qr(torch.randn(rows, min(rows, cols), generator=generator(seed))).Q
    v = torch.linalg.qr(torch.randn(cols, min(rows, cols), generator=generator(seed + 1))).Q
    return (u * torch.arange(1, min(rows, cols) + 1).float().pow(-power)) @ v.T


@pytest.mark.parametrize("shape", SHAPES)
def test_the_smaller_side_is_projected(shape):
    gradient = torch.randn(shape, generator=generator(0))
    basis = find_basis(gradient, 8, generator=generator(1))
    small = project(gradient, basis, projects_right(*shape))
    assert basis.shape == (min(shape), 8)
    assert sorted(small.shape) == sorted((max(shape), 8))
    assert project_back(small, basis, projects_right(*shape)).shape == shape


@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (300, 90), (90, 300)])
def test_the_larger_side_is_projected_when_asked_and_costs_what_the_formula_says(shape):
    gradient, right = decaying(*shape, seed=5), projects_right(*shape, True)
    basis = find_basis(gradient, 8, generator=generator(1), larger=True)
    small = project(gradient, basis, right)
    assert basis.shape == basis_shape(*shape, 8, True) == (max(shape), 8)
    assert small.shape == projected_shape(*shape, 8, True) and sorted(small.shape) == [8, min(shape)]
    assert project_back(small, basis, right).shape == shape
    # The best basis of one side captures exactly what the best one of the other does: the top singular values.
    best = project(gradient, paper.galore_basis(gradient, 8), projects_right(*shape)).square().sum()
    assert 0.995 * best <= small.square().sum() <= best * (1 + 1e-5)


@pytest.mark.parametrize("larger", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_projected_product_is_the_projection_of_the_product(shape, larger, dtype):
    left, other = (torch.randn(50, side, generator=generator(i)).to(dtype) for i, side in enumerate(shape))
    basis = find_basis(left.float().T @ other.float(), 8, generator=generator(2), larger=larger)
    right = projects_right(*shape, larger)
    got = project_product(left, other, basis, right)
    gradient = left.double().T @ other.double()
    truth = gradient @ basis.double() if right else basis.double().T @ gradient
    assert got.dtype == torch.float32 and got.shape == projected_shape(*shape, 8, larger)
    # 16-bit gradients are rounded once, as a linear map's own are.
    assert (got - truth).norm() <= {4: 1e-6, 2: torch.finfo(dtype).eps}[dtype.itemsize] * truth.norm()


@pytest.mark.parametrize("shape", [*SHAPES, (4096, 4096), (11008, 4096)])
@pytest.mark.parametrize("rank", [4, 30, 128, 2000, 3000])
def test_products_are_preferred_where_they_take_fewer_operations(shape, rank):
    (rows, cols), tokens = shape, 1024
    in_products = tokens * rank * cols + tokens * rank * rows
    assert is_cheaper_in_products(rows, cols, rank) == (in_products < tokens * rows * cols)


@pytest.mark.parametrize("larger", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_columns_are_orthonormal(shape, rank, larger):
    gradient = torch.randn(shape, generator=generator(3))
    basis = find_basis(gradient, rank, generator=generator(1), larger=larger)
    assert torch.allclose(basis.T @ basis, torch.eye(rank), atol=5e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_captured_energy_is_nearly_that_of_the_full_svd(shape, power):
    gradient = decaying(*shape, seed=5, power=power)
    right = projects_right(*shape)
    best = project(gradient, paper.galore_basis(gradient, 12), right).square().sum()
    ours = project(gradient, find_basis(gradient, 12, generator=generator(0)), right).square().sum()
    assert 0.995 * best <= ours <= best * (1 + 1e-5)


def test_a_warm_start_is_at_least_as_good_after_one_iteration():
    gradient = decaying(300, 200, seed=9, power=0.5)
    start = find_basis(gradient, 16, generator=generator(0))
    warm = find_basis(gradient, 16, generator=generator(1), start=start, iterations=1)
    cold = find_basis(gradient, 16, generator=generator(1), iterations=1)
    assert project(gradient, warm, True).square().sum() >= project(gradient, cold, True).square().sum() * (1 - 1e-6)


def test_a_matrix_of_low_rank_is_rebuilt_exactly():
    left, right = torch.randn(80, 3, generator=generator(0)), torch.randn(50, 3, generator=generator(1))
    gradient = left @ right.T
    basis = find_basis(gradient, 8, generator=generator(2))
    assert torch.allclose(basis.T @ basis, torch.eye(8), atol=5e-6)
    assert torch.allclose(project_back(project(gradient, basis, True), basis, True), gradient, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 20), (500, 300)])
def test_a_zero_gradient_has_an_orthonormal_basis(shape):
    basis = find_basis(torch.zeros(shape), 4, generator=generator(0))
    assert torch.allclose(basis.T @ basis, torch.eye(4), atol=5e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(bad):
    gradient = torch.randn(30, 20)
    gradient[3, 4] = bad
    with pytest.raises(FloatingPointError):
        find_basis(gradient, 4, generator=generator(0))


def test_one_seed_gives_one_basis():
    gradient = torch.randn(300, 200, generator=generator(0))
    first, second = (find_basis(gradient, 16, generator=generator(4)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("right", [True, False])
def test_rotating_into_the_same_basis_changes_nothing(right):
    basis = torch.linalg.qr(torch.randn(30, 6, generator=generator(0))).Q
    shape = (40, 6) if right else (6, 40)
    mean, square = torch.randn(shape, generator=generator(1)), torch.rand(shape, generator=generator(2))
    turned = rotate_moments(mean, square, basis, basis, right)
    assert torch.allclose(turned[0], mean, atol=1e-5) and torch.allclose(turned[1], square, atol=1e-5)


@pytest.mark.parametrize("right", [True, False])
def test_the_mean_keeps_its_place_in_the_full_space_when_the_span_stays(right):
    basis = torch.linalg.qr(torch.randn(30, 6, generator=generator(0))).Q
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator(3))).Q
    shape = (40, 6) if right else (6, 40)
    mean = torch.randn(shape, generator=generator(1))
    turned, square = rotate_moments(mean, mean.square(), basis, basis @ turn, right)
    assert torch.allclose(project_back(turned, basis @ turn, right), project_back(mean, basis, right), atol=1e-5)
    assert (square >= 0).all()


@pytest.mark.parametrize("right", [True, False])
def test_two_bfloat16_halves_of_a_basis_project_like_the_whole_one(monkeypatch, right):
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out_dtype: product(a.to(out_dtype), b.to(out_dtype)))
    gradient = torch.randn(60, 40, generator=generator(0)).bfloat16()
    basis = torch.linalg.qr(torch.randn(40 if right else 60, 8, generator=generator(1))).Q
    whole, halves = project(gradient, basis, right), projector._project_halves(gradient, basis, right)
    assert whole.dtype == halves.dtype == torch.float32 and whole.shape == halves.shape
    assert (whole - halves).norm() <= 2**-15 * whole.norm()


@pytest.mark.parametrize("right", [True, False])
def test_adding_what_is_projected_back_is_adding_the_product(right):
    basis = torch.linalg.qr(torch.randn(40 if right else 60, 8, generator=generator(1))).Q
    update = torch.randn(*((60, 8) if right else (8, 40)), generator=generator(2))
    into = torch.randn(60, 40, generator=generator(3))
    expected = 0.9 * into - 0.3 * project_back(update, basis, right)
    add_projected_back(into, update, basis, right, beta=0.9, alpha=-0.3)
    assert torch.allclose(into, expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("right", [True, False])
def test_on_a_gpu_a_bfloat16_gradient_is_projected_as_in_float64(right):
    gradient = torch.randn(700, 500, device="cuda").bfloat16()
    basis = torch.linalg.qr(torch.randn(500 if right else 700, 32, device="cuda")).Q
    exact = gradient.double() @ basis.double() if right else basis.double().T @ gradient.double()
    assert (project(gradient, basis, right) - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("right", [True, False])
def test_on_a_gpu_a_projected_product_of_bfloat16_is_as_near_as_the_rounded_product(right):
    left, other = (torch.randn(600, side, device="cuda").bfloat16() for side in (700, 500))
    basis = torch.linalg.qr(torch.randn(500 if right else 700, 32, device="cuda")).Q
    gradient = left.double().T @ other.double()
    exact = gradient @ basis.double() if right else basis.double().T @ gradient
    got = project_product(left, other, basis, right)
    assert got.dtype == torch.float32
    assert (got - exact).norm() <= torch.finfo(torch.bfloat16).eps * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [0.3, 1.0, 3.0])
def test_on_a_gpu_a_basis_is_orthonormal_and_captures_what_it_does_on_a_cpu(decay):
    left, right = (torch.linalg.qr(torch.randn(size, 400, generator=generator(size))).Q for size in (700, 900))
    gradient = (left * torch.arange(1, 401) ** -decay) @ right.T
    there = find_basis(gradient.cuda(), 32, generator=torch.Generator("cuda").manual_seed(0)).cpu()
    here = find_basis(gradient, 32, generator=generator(0))
    assert torch.allclose(there.T @ there, torch.eye(32), atol=1e-5)
    energy = [float(project(gradient, basis, False).square().sum()) for basis in (there, here)]
    assert energy[0] == pytest.approx(energy[1], rel=2e-3)


@pytest.mark.gpu
def test_on_a_gpu_zero_and_dependent_gradients_have_a_basis_and_nan_has_none():
    for rank in (0, 1, 5):
        gradient = (
            torch.randn(300, max(rank, 1), device="cuda") @ torch.randn(max(rank, 1), 400, device="cuda") * (rank > 0)
        )
        basis = find_basis(gradient, 32, generator=torch.Generator("cuda").manual_seed(0))
        assert torch.allclose(basis.T @ basis, torch.eye(32, device="cuda"), atol=1e-4)
        kept = project(gradient, basis, False).norm()
        assert torch.allclose(kept, gradient.norm(), rtol=1e-3)
    with pytest.raises(FloatingPointError):
        find_basis(torch.full((300, 400), torch.nan, device="cuda"), 32, generator=torch.Generator("cuda"))

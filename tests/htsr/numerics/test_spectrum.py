"""Spectra from Gram blocks against singular values, planted spectra and symmetries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from htsr.errors import BadInput
from htsr.numerics import spectrum
from htsr.numerics.spectrum import MatrixSlice, eigenvalues, gram, plan_slices

EPS = np.finfo(np.float64).eps


def random(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, (rows, cols)).astype(np.float32)


@pytest.mark.parametrize("shape", [(64, 64), (300, 40), (40, 300), (1, 50), (50, 1), (1100, 1030), (1030, 1300)])
def test_eigenvalues_are_squared_singular_values(shape: tuple[int, int]) -> None:
    W = random(*shape)
    expected = np.sort(np.linalg.svd(W.astype(np.float64), compute_uv=False) ** 2)
    found = eigenvalues(W)
    assert found.dtype == np.float64
    assert np.all(np.diff(found) >= 0)
    assert np.max(np.abs(found - expected)) <= 50 * min(shape) * EPS / 2 * expected[-1]


@pytest.mark.parametrize("shape", [(5000, 24), (24, 5000), (900, 1100)])
def test_blocks_change_nothing_beyond_rounding(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    W = random(*shape)
    whole = eigenvalues(W)
    monkeypatch.setattr(spectrum, "BLOCK_ELEMENTS", 8000)
    assert len(plan_slices(*shape)) > 1
    assert eigenvalues(W) == pytest.approx(whole, rel=1e-9, abs=1e-12 * whole[-1])


@pytest.mark.parametrize("shape", [(7, 9), (49152, 576), (576, 49152), (4096, 11008), (11008, 4096), (8192, 28672)])
def test_plan_covers_the_matrix_once_within_its_budget(shape: tuple[int, int]) -> None:
    blocks = plan_slices(*shape)
    axis = blocks[0].axis
    assert {b.axis for b in blocks} == {axis}
    assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]
    assert blocks[-1].stop == shape[axis]
    assert all(b.start % spectrum.BLOCK_MULTIPLE == 0 for b in blocks)
    side = min(shape)
    largest = max(b.stop - b.start for b in blocks) * (shape[1] if axis == 0 else shape[0])
    assert largest <= max(spectrum.BLOCK_ELEMENTS, side * side // 4, side * spectrum.BLOCK_MULTIPLE)


def test_a_small_matrix_is_one_block() -> None:
    assert plan_slices(1536, 576) == [MatrixSlice(0, 1536)]


@pytest.mark.parametrize("side", [60, 1030])
def test_gram_is_the_sum_over_slices_and_symmetric(side: int) -> None:
    W = random(side + 200, side).astype(np.float64)
    G = gram([W[:100], W[100:]], side)
    assert np.array_equal(G, G.T)
    assert np.allclose(G, W.T @ W, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 5, 63])
def test_rank_deficient_matrices_have_zeros_not_noise(rank: int) -> None:
    rng = np.random.default_rng(rank)
    W = rng.normal(size=(200, rank)) @ rng.normal(size=(rank, 64)) * 1e4
    assert np.count_nonzero(eigenvalues(W)) == rank


def test_planted_singular_values_are_recovered() -> None:
    rng = np.random.default_rng(0)
    planted = np.sort(rng.pareto(2, 80) + 1)
    U, V = np.linalg.qr(rng.normal(size=(120, 80)))[0], np.linalg.qr(rng.normal(size=(80, 80)))[0]
    assert eigenvalues((U * planted) @ V) == pytest.approx(planted**2, rel=1e-10)


def test_transposition_permutation_and_signs_change_nothing_beyond_rounding() -> None:
    W, rng = random(90, 60), np.random.default_rng(1)
    signs = rng.choice([-1.0, 1.0], size=60).astype(np.float32)
    reference = eigenvalues(W)
    for other in (W.T, W[rng.permutation(90)][:, rng.permutation(60)], W * signs):
        assert eigenvalues(other) == pytest.approx(reference, rel=1e-10)


def test_powers_of_two_scale_exactly() -> None:
    W = random(90, 60)
    assert np.array_equal(eigenvalues(W * np.float32(0.25)), eigenvalues(W) / 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_every_float_type_are_read_exactly(dtype: torch.dtype) -> None:
    W = torch.from_numpy(random(50, 30)).to(dtype)
    assert np.array_equal(eigenvalues(W), eigenvalues(W.double().numpy()))


def test_fp32_is_close_and_fp64_the_default() -> None:
    W = random(200, 100)
    rough, exact = eigenvalues(W, np.float32), eigenvalues(W)
    assert rough == pytest.approx(exact, abs=1e-5 * exact[-1])
    assert not np.array_equal(rough, exact)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [20, 1030])
def test_not_finite_is_bad_input(bad: float, side: int) -> None:
    W = random(side, side)
    W[3, 4] = bad
    with pytest.raises(BadInput, match="NaN or infinite"):
        eigenvalues(W)


@pytest.mark.parametrize("W", [np.zeros(5), np.zeros((2, 2, 2)), np.zeros((0, 4))])
def test_anything_but_a_matrix_is_bad_input(W: np.ndarray) -> None:
    with pytest.raises(BadInput, match="non-empty matrix"):
        eigenvalues(W)


def test_a_zero_matrix_has_a_zero_spectrum() -> None:
    assert np.array_equal(eigenvalues(np.zeros((9, 12))), np.zeros(9))

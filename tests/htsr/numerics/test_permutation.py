"""Largest eigenvalues against permutations: exact comparisons, a calibrated p, and power against planted spikes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kurtosis

from htsr.numerics.permutation import measure_entries, permutation_p, reaches
from htsr.numerics.powerlaw import fit_power_law


def top(W: np.ndarray) -> float:
    return float(np.linalg.norm(W.astype(np.float64), 2) ** 2)


def null_p(W: np.ndarray, rng: np.random.Generator) -> float:
    """p_null by the rule of `--nulls`."""
    entries = measure_entries([W], *W.shape)
    if entries.light_tailed:
        return entries.noise_survival(top(W))
    return permutation_p(W.astype(np.float32), top(W), rng)


@pytest.mark.parametrize("shape", [(96, 96), (64, 300), (300, 64), (9, 8)])
def test_comparison_with_the_largest_eigenvalue_is_right(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[1])
    for draw in (rng.standard_normal, lambda s: rng.standard_t(2, s)):
        W = draw(shape).astype(np.float32)
        assert reaches(W, 0.5 * top(W), rng)
        assert reaches(W, (1 - 1e-3) * top(W), rng)
        assert not reaches(W, (1 + 1e-3) * top(W), rng)
        assert not reaches(W, 3.0 * top(W), rng)


def test_the_second_eigenvalue_is_never_taken_for_the_largest() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        W = rng.standard_normal((128, 128)).astype(np.float32)  # neighbours lie within a few percent of each other
        largest = float(np.linalg.eigvalsh((W.T @ W).astype(np.float64))[-1])
        assert reaches(W, (1 - 3e-4) * largest, rng)
        assert not reaches(W, (1 + 3e-4) * largest, rng)


def test_p_counts_permutations_that_reach_the_value() -> None:
    W = np.random.default_rng(0).standard_t(3, (40, 50)).astype(np.float32)
    assert permutation_p(W.copy(), 0.0, np.random.default_rng(1), permutations=19) == 1.0
    assert permutation_p(W.copy(), 1e9, np.random.default_rng(1), permutations=19) == 1 / 20
    value, rng, start = top(W), np.random.default_rng(1), W.copy()
    exact = []
    for _ in range(19):  # the same stream of random numbers: a shuffle, then Lanczos' start
        rng.shuffle(start.reshape(-1))
        exact.append(top(start) >= value)
        rng.standard_normal(40, np.float32)
    assert permutation_p(W.copy(), value, np.random.default_rng(1), permutations=19) == (1 + sum(exact)) / 20


def test_p_is_a_function_of_the_seed_and_keeps_the_entries() -> None:
    W = np.random.default_rng(2).standard_t(3, (30, 30)).astype(np.float32)
    first, second = W.copy(), W.copy()
    p = [permutation_p(M, top(W), np.random.default_rng(5), permutations=39) for M in (first, second)]
    assert p[0] == p[1]
    assert np.array_equal(first, second)
    assert np.array_equal(np.sort(first, axis=None), np.sort(W, axis=None))
    assert not np.array_equal(first, W)


def test_a_constant_matrix_is_like_its_permutations() -> None:
    W = np.full((20, 30), 0.37, np.float32)
    assert permutation_p(W, top(W), np.random.default_rng(0), permutations=19) == 1.0


def spiked(side: int, rng: np.random.Generator) -> np.ndarray:
    """Noise and three spikes at 1.1, 1.25 and 1.5 times its edge: (1 + u)^2 / u = 4 m for a squared strength u."""
    W = rng.standard_normal((side, side))
    for m in (1.1, 1.25, 1.5):
        u = (2 * m - 1) + np.sqrt((2 * m - 1) ** 2 - 1)
        left, right = rng.standard_normal((2, side))
        W += np.sqrt(u * side) * np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
    return W


def test_200_gaussian_matrices_are_noise_where_alpha_calls_a_third_of_them_good() -> None:
    rng = np.random.default_rng(11)
    alike = good = 0
    for _ in range(200):
        W = rng.standard_normal((256, 256))
        eigenvalues = np.linalg.eigvalsh(W.T @ W)
        entries = measure_entries([W], 256, 256)
        assert entries.light_tailed
        alike += entries.noise_survival(float(eigenvalues[-1])) < 0.05
        good += 2 <= fit_power_law(eigenvalues[eigenvalues > 1e-5]).alpha <= 6
    assert alike <= 16  # 5 % of 200 and two standard errors
    assert good >= 50


def test_planted_spikes_are_not_noise() -> None:
    rng = np.random.default_rng(13)
    assert sum(null_p(spiked(256, rng), rng) < 0.05 for _ in range(40)) >= 38


def test_permutations_are_calibrated_and_have_power() -> None:
    rng = np.random.default_rng(14)
    noise = [rng.standard_normal((72, 72)).astype(np.float32) for _ in range(60)]
    assert sum(permutation_p(W, top(W), rng) < 0.05 for W in noise) <= 7  # 5 % of 60 and two standard errors
    matrices = [spiked(128, rng).astype(np.float32) for _ in range(20)]
    assert sum(permutation_p(W, top(W), rng) < 0.05 for W in matrices) >= 19


def test_heavy_tailed_noise_is_not_mistaken_for_structure() -> None:
    rng = np.random.default_rng(12)
    matrices = [rng.standard_t(3, (64, 64)) for _ in range(30)]
    assert not any(measure_entries([W], 64, 64).light_tailed for W in matrices)
    assert sum(null_p(W, rng) < 0.05 for W in matrices) <= 5
    by_law = [measure_entries([W], 64, 64).noise_survival(top(W)) for W in matrices]
    assert sum(p < 0.05 for p in by_law) > 15  # what Tracy-Widom would have said


HEAVY = {
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "student t, 5": lambda rng, shape: rng.standard_t(5, shape),
    "sparse normal": lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) < 0.1),
    "sparse signs": lambda rng, shape: np.sign(rng.standard_normal(shape)) * (rng.random(shape) < 0.02),
    "two scales": lambda rng, shape: rng.standard_normal(shape) * np.where(rng.random(shape) < 0.05, 4, 1),
}


@pytest.mark.parametrize("law", HEAVY)
def test_noise_never_reaches_the_bound_and_structure_does(law: str) -> None:
    rng = np.random.default_rng(21)
    seen = 0
    for shape in [(64, 64), (96, 300)] * 20:
        W = HEAVY[law](rng, shape)
        entries = measure_entries([W], *shape)
        seen += entries.spread_out
        assert np.isnan(entries.bound_survival(top(W)))
        spike = np.outer(*(np.sign(rng.standard_normal(side)) for side in shape))  # no entry stands out
        W = W + 2 * W.std() * spike
        assert not measure_entries([W], *shape).bound_survival(top(W)) > 1e-9
    assert seen > 5
    W = HEAVY[law](rng, (256, 256))
    W += 1.5 * W.std() * np.outer(*np.sign(rng.standard_normal((2, 256))))
    assert measure_entries([W], 256, 256).bound_survival(top(W)) < 1e-9


def test_moments_of_pieces_are_those_of_the_whole() -> None:
    W = 0.3 + np.random.default_rng(3).standard_t(5, (70, 40))
    entries = measure_entries([W[:30], W[30:]], 70, 40)
    assert entries.mean == pytest.approx(W.mean())
    assert entries.variance == pytest.approx(W.var())
    assert entries.kurtosis == pytest.approx(kurtosis(W, axis=None), rel=1e-9)
    assert entries.largest == np.abs(W).max()


def test_what_could_pass_for_a_spike_is_not_light_tailed() -> None:
    W = np.random.default_rng(4).standard_normal((128, 128))
    assert measure_entries([W], 128, 128).light_tailed
    single = W.copy()
    single[0, 0] = 20.0
    for other in (single, W + 0.2, W[:32, :32], W * np.random.default_rng(5).uniform(0, 2, (128, 1))):
        assert not measure_entries([other], *other.shape).light_tailed

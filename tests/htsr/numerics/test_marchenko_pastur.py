"""Noise in a spectrum: the law by quadrature, planted scales and planted spikes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from htsr.numerics.marchenko_pastur import fit_noise, noise_density, noise_quantiles, noise_survival

SHAPES = [(256, 256), (192, 768), (768, 192), (300, 330)]


def eigenvalues(W: np.ndarray) -> np.ndarray:
    return np.linalg.svd(W, compute_uv=False)[::-1] ** 2


@pytest.mark.parametrize("shape", SHAPES)
def test_quantiles_invert_the_integral_of_the_density(shape: tuple[int, int]) -> None:
    n, m = max(shape), min(shape)
    low = (np.sqrt(n) - np.sqrt(m)) ** 2
    for level in (0.1, 0.5, 0.9):
        x = float(noise_quantiles(np.array([level]), *shape)[0])
        # x = low + t^2 takes the singularity at 0 out of the integrand
        found = quad(lambda t: 2 * t * float(noise_density(low + t * t, 1.0, *shape)), 0, np.sqrt(x - low))[0]
        assert found == pytest.approx(level, abs=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_noise_scale_is_found_with_and_without_spikes(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    W = 0.02 * rng.standard_normal(shape)
    spiked = W + 3 * np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1])) / np.sqrt(max(shape))
    for matrix, spikes in ((W, 0), (spiked, 1)):
        noise = fit_noise(eigenvalues(matrix), *shape)
        assert noise.sigma == pytest.approx(0.02, rel=0.01)
        assert noise.edge == pytest.approx(0.02**2 * (np.sqrt(shape[0]) + np.sqrt(shape[1])) ** 2, rel=0.02)
        assert noise.num_spikes in ((0, 1) if spikes == 0 else (1, 2))
        assert (noise.p_edge < 1e-6) == (spikes == 1)


def test_noise_has_uniform_p_and_rarely_spikes() -> None:
    rng = np.random.default_rng(0)
    found = [eigenvalues(rng.standard_normal((96, 160))) for _ in range(200)]
    p = np.array([noise_survival(float(e[-1]), 1.0, 96, 160) for e in found])
    assert 2 <= np.sum(p < 0.05) <= 20
    assert 0.4 < np.mean(p) < 0.6
    assert sum(fit_noise(e, 96, 160).num_spikes > 0 for e in found) <= 24


def test_planted_spikes_are_counted() -> None:
    rng = np.random.default_rng(1)
    counts = []
    for _ in range(40):
        W = rng.standard_normal((256, 256))
        for strength in (3.0, 4.0, 6.0):  # 1.33, 1.56 and 2.04 times the edge
            left, right = rng.standard_normal((2, 256))
            W += np.sqrt(strength * 256) * np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
        counts.append(fit_noise(eigenvalues(W), 256, 256).num_spikes)
    assert counts.count(3) >= 36


def test_everything_follows_the_scale_of_the_weights() -> None:
    e = eigenvalues(np.random.default_rng(2).standard_normal((64, 90)))
    once, scaled = fit_noise(e, 64, 90), fit_noise(16 * e, 64, 90)
    assert (scaled.sigma, scaled.edge) == pytest.approx((4 * once.sigma, 16 * once.edge), rel=1e-12)
    assert (scaled.num_spikes, scaled.p_edge) == (once.num_spikes, pytest.approx(once.p_edge, rel=1e-9))


def test_a_product_of_thin_factors_is_all_spikes() -> None:
    e = np.concatenate([np.zeros(60), [1.0, 2.0, 3.0, 4.0]])
    noise = fit_noise(e, 64, 64)
    assert (noise.sigma, noise.edge, noise.num_spikes) == (0.0, 0.0, 4)
    assert np.isnan(noise.p_edge)

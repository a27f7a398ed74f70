"""FARMS against a transcription of its definition, and what it is for: aspect ratios drop out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from htsr.numerics.farms import alpha_farms, window_starts
from htsr.numerics.metrics import alpha_hill


def transcription(W: np.ndarray) -> float:
    """Hu et al. 2025: 10 x 10 windows of 100 x 200, singular values squared, pooled, Hill from the median on."""
    pooled: list[float] = []
    steps = [max(1, math.floor((W.shape[0] - 100) / 9)), max(1, math.floor((W.shape[1] - 200) / 9))]
    for i in range(min(10, (W.shape[0] - 100) // steps[0] + 1)):
        for j in range(min(10, (W.shape[1] - 200) // steps[1] + 1)):
            window = W[i * steps[0] : i * steps[0] + 100, j * steps[1] : j * steps[1] + 200]
            pooled += (np.linalg.svd(window, compute_uv=False) ** 2).tolist()
    x = sorted(value for value in pooled if value > 1e-5)
    i = int(len(x) / 2)
    return 1 + (len(x) - i) / sum(math.log(value / x[i]) for value in x[i:])


@pytest.mark.parametrize("shape", [(130, 260), (100, 200), (104, 700), (400, 210)])
def test_farms_equals_its_definition(shape: tuple[int, int]) -> None:
    W = 0.05 * np.random.default_rng(0).standard_t(4, shape)
    assert alpha_farms(W) == pytest.approx(transcription(W), rel=1e-8)


def test_the_aspect_ratio_drops_out() -> None:
    rng = np.random.default_rng(1)
    square, wide = rng.standard_normal((300, 300)), rng.standard_normal((300, 1200))
    hill = [alpha_hill(np.linalg.svd(W, compute_uv=False)[::-1] ** 2) for W in (square, wide)]
    farms = [alpha_farms(W) for W in (square, wide)]
    assert abs(hill[0] - hill[1]) > 1
    assert farms[0] == pytest.approx(farms[1], abs=0.05)


def test_small_matrices_get_smaller_windows_or_none() -> None:
    W = np.random.default_rng(2).standard_normal((40, 30))
    assert np.isfinite(alpha_farms(W))  # windows of 15 x 30
    assert np.isnan(alpha_farms(W[:, :15]))
    assert np.isnan(alpha_farms(W[:7]))


def test_windows_stay_inside() -> None:
    for side in (100, 101, 108, 109, 110, 1000, 4096):
        starts = list(window_starts(side, 100))
        assert starts[0] == 0
        assert starts[-1] + 100 <= side
        assert len(starts) == len(set(starts)) <= 10

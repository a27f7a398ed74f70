"""No spectrum within the radii has another xmin than the one that is certified: exhaustive fits against the bounds."""

from __future__ import annotations

import numpy as np
import pytest
from makers import ks_distances, near_tie

from htsr.numerics.certificate import Boxes, fit_errors, judge
from htsr.numerics.powerlaw import fit_power_law

CUT = 1e-5


def spectrum(rng: np.random.Generator) -> np.ndarray:
    n = int(rng.integers(60, 300))
    kind = rng.integers(4)
    if kind == 0:
        x = rng.pareto(rng.uniform(0.5, 5), n) + 1
    elif kind == 1:
        x = np.exp(rng.normal(0, rng.uniform(0.3, 2), n))
    elif kind == 2:
        x = np.linalg.svd(rng.standard_normal((n, n)), compute_uv=False) ** 2
    else:
        x = np.concatenate([rng.uniform(0.1, 1, n // 2), rng.pareto(2, n - n // 2) + 1])
    return np.sort(x)


def shaken(x: np.ndarray, radius: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another spectrum within the radii."""
    moves = rng.choice([-1.0, 1.0], len(x)) if rng.random() < 0.5 else rng.uniform(-1, 1, len(x))
    if rng.random() < 0.3:
        moves[:] = moves[0]
    return np.maximum.accumulate(np.maximum(x + moves * radius, 0.0))


@pytest.mark.parametrize("seed", range(40))
def test_errors_of_distances_and_exponents_stay_within_their_bounds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = spectrum(rng)
    radius = np.full(len(y), y[-1] * 10 ** rng.uniform(-7, -4))
    U, relative = fit_errors(y, radius, CUT)
    alphas, distances = ks_distances(y)
    for _ in range(4):
        x = shaken(y, radius, rng)
        x = np.clip(x, y - radius, y + radius)
        usable = np.isfinite(U) & (x[:-1] > 0)
        if not usable.any():
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            others, moved = ks_distances(x)
        assert np.all(np.abs(moved - distances)[usable] <= U[usable] + 1e-12)
        assert np.all(np.abs(others - alphas)[usable] <= ((alphas - 1) * relative)[usable] + 1e-9 * alphas[usable])


@pytest.mark.parametrize("seed", range(30))
def test_boxes_bound_the_distance_of_candidates_that_are_noise(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    y = spectrum(rng)
    radius = np.full(len(y), y[-1] * 10 ** rng.uniform(-4, -2))
    boxes = Boxes(np.maximum(y, CUT), radius, CUT)
    bounds = [boxes.lower_bound(i) for i in range(0, len(y) - 2, 7)]
    assert max(bounds) > 0.02  # and they are no idle bounds
    for _ in range(4):
        x = np.maximum(shaken(y, radius, rng), CUT * 1.01)
        x = np.clip(x, np.maximum(y - radius, CUT), y + radius)
        distances = ks_distances(x)[1][: len(y) - 2 : 7]
        assert np.all(distances >= np.array(bounds) - 1e-12)


def test_a_certified_xmin_is_that_of_every_spectrum_within_the_radii() -> None:
    """250 spectra, a third with two candidates made nearly equal in D; what is certified must never be wrong."""
    certified = doubtful = 0
    for seed in range(250):
        rng = np.random.default_rng(1000 + seed)
        y = spectrum(rng)
        if seed % 3 == 0:
            y = near_tie(y, gap=10 ** rng.uniform(-8, -4))
        radius = np.where(np.arange(len(y)) < len(y) // 2, y[-1] * 10 ** rng.uniform(-8, -1), y * 1e-9)
        verdict = judge(y, radius, CUT)
        fits = [fit_power_law(x[x > CUT]) for x in (shaken(y, radius, rng) for _ in range(3))]
        found = {fit.n_tail for fit in fits}
        if verdict.rival < 0:
            certified += 1
            assert found == {len(y) - verdict.best}, seed
            assert all(abs(fit.alpha - verdict.alpha) <= verdict.alpha_error + 1e-9 for fit in fits)
        else:
            doubtful += 1
    assert certified > 120
    assert doubtful > 20


def test_candidates_closer_than_the_errors_are_named() -> None:
    found = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        y = near_tie(spectrum(rng), gap=1e-9)
        D = np.sort(ks_distances(y)[1])
        if D[1] - D[0] < 1e-7:
            found += 1
            assert judge(y, y * 1e-6, CUT).rival >= 0
    assert found > 5


def test_no_radius_leaves_no_doubt() -> None:
    for seed in range(30):
        y = spectrum(np.random.default_rng(seed))
        verdict, fit = judge(y, np.zeros(len(y)), CUT), fit_power_law(y[y > CUT])
        assert (len(y) - verdict.best, verdict.alpha) == (fit.n_tail, fit.alpha)
        assert verdict.rival < 0 or np.diff(np.sort(ks_distances(y)[1])[:2])[0] < 1e-10


def test_a_best_candidate_at_the_cut_is_its_own_rival() -> None:
    y = np.sort(np.random.default_rng(0).pareto(2, 100) + 1)
    verdict = judge(y, np.full(100, 0.01), cut=float(y[0]) + 0.001)
    assert verdict.rival >= 0

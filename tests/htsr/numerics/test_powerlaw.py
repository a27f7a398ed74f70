"""The branch-and-bound fit: the exhaustive one bit for bit, planted slopes, and failures that say why."""

from __future__ import annotations

import numpy as np
import paper
import pytest

from htsr.numerics import powerlaw
from htsr.numerics.powerlaw import FitStatus, fit_power_law


def spectrum(kind: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Six kinds: pure tails, bulks, ties, plateaus, all values three times, wide log-normals."""
    match kind:
        case 0:
            return rng.pareto(rng.uniform(1, 5), size) + 1
        case 1:
            return rng.chisquare(3, size)
        case 2:
            return np.round(rng.pareto(2, size) + 1, 1)
        case 3:
            return np.concatenate([np.full(size // 2, 0.5), rng.pareto(1.5, size - size // 2) + 0.5])
        case 4:
            return np.repeat(rng.lognormal(size=size // 3 + 1), 3)
        case _:
            return np.exp(rng.normal(size=size) * rng.uniform(0.1, 4))


def assert_same_as_exhaustive(x: np.ndarray) -> None:
    alpha, xmin, ks_d, sigma, _ = paper.exhaustive_power_law(x)
    fit = fit_power_law(x)
    if not 1 < alpha < powerlaw.ALPHA_LIMIT:  # the exhaustive fit reports a tail without spread as a success
        assert fit.status is FitStatus.DEGENERATE
        return
    assert (fit.alpha, fit.xmin, fit.ks_d, fit.sigma) == (alpha, xmin, ks_d, sigma)
    assert fit.n_tail == np.count_nonzero(x >= xmin)
    assert fit.status is FitStatus.OK


@pytest.mark.parametrize("kind", range(6))
def test_fit_equals_the_exhaustive_fit_bit_for_bit(kind: int) -> None:
    rng = np.random.default_rng(kind)
    for size in rng.integers(20, 500, size=70):
        assert_same_as_exhaustive(spectrum(kind, int(size), rng))


@pytest.mark.parametrize("size", range(2, 21))
def test_small_samples_equal_the_exhaustive_fit_bit_for_bit(size: int) -> None:
    rng = np.random.default_rng(size)
    for kind in range(6):
        assert_same_as_exhaustive(spectrum(kind, size, rng)[:size])


@pytest.mark.parametrize("size", [1500, 4096])
def test_fit_of_a_large_spectrum_equals_the_exhaustive_fit(size: int) -> None:
    rng = np.random.default_rng(size)
    assert_same_as_exhaustive(np.linalg.svd(rng.standard_t(3, (400, 500)), compute_uv=False) ** 2)
    assert_same_as_exhaustive(rng.pareto(3, size) + 1)


def test_lower_bounds_never_exceed_the_distance() -> None:
    rng = np.random.default_rng(5)
    for kind in range(6):
        x = np.sort(spectrum(kind, 120, rng))
        bounds = powerlaw.lower_bounds(np.log(x))
        with np.errstate(divide="ignore"):
            distances = [powerlaw.candidate(x, np.log(x), i)[1] for i in range(len(x) - 1)]
        assert np.all(bounds <= distances)


def test_few_candidates_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    visits: list[int] = []
    exact = powerlaw.candidate
    monkeypatch.setattr(powerlaw, "candidate", lambda x, log_x, i: visits.append(i) or exact(x, log_x, i))
    rng = np.random.default_rng(0)
    for _ in range(20):
        fit_power_law(rng.pareto(2, 1000) + 1)
    assert len(visits) / 20 < 150  # of 999; a tail without a bulk is the hardest case, every xmin fits it


@pytest.mark.parametrize("alpha", [2.0, 3.0, 4.0, 6.0])
def test_planted_slope_is_recovered(alpha: float) -> None:
    rng = np.random.default_rng(int(alpha))
    found = [fit_power_law(rng.pareto(alpha - 1, 1024) + 1).alpha for _ in range(40)]
    spread = {2.0: 0.04, 3.0: 0.09, 4.0: 0.13, 6.0: 0.222}[alpha]  # sd of one fit at this size, measured
    assert abs(np.mean(found) - alpha) < 4 * spread / np.sqrt(40) + 0.004 * alpha  # the selection of xmin is biased up


def test_planted_tail_start_is_found() -> None:
    rng = np.random.default_rng(1)
    bulk, tail = rng.uniform(0.1, 5.0, 3000), 5.0 * (rng.pareto(2.0, 2000) + 1)
    fit = fit_power_law(np.concatenate([bulk, tail]))
    assert fit.alpha == pytest.approx(3.0, abs=0.15)
    assert 4.5 < fit.xmin < 8


def test_fit_agrees_with_the_powerlaw_package() -> None:
    package = pytest.importorskip("powerlaw")
    x = np.random.default_rng(2).pareto(2.5, 300) + 1
    theirs = package.Fit(x, xmax=None, verbose=False)
    ours = fit_power_law(x)
    assert ours.alpha == pytest.approx(theirs.alpha, rel=1e-9)
    assert ours.xmin == theirs.xmin


def test_alpha_is_invariant_under_scale_and_order() -> None:
    rng = np.random.default_rng(3)
    x = rng.pareto(2, 400) + 1
    fit, scaled, shuffled = fit_power_law(x), fit_power_law(1024 * x), fit_power_law(rng.permutation(x))
    assert shuffled == fit
    assert (scaled.alpha, scaled.ks_d) == pytest.approx((fit.alpha, fit.ks_d), rel=1e-9)
    assert (scaled.n_tail, scaled.xmin) == (fit.n_tail, 1024 * fit.xmin)


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ([], FitStatus.TOO_FEW),
        ([3.0], FitStatus.TOO_FEW),
        ([2.0] * 30, FitStatus.DEGENERATE),
        ([2.0] * 10, FitStatus.DEGENERATE),
        ([0.0] + [1.0, 2.0] * 20, FitStatus.NOT_POSITIVE),
        ([-1.0] + [1.0, 2.0] * 20, FitStatus.NOT_POSITIVE),
        ([np.nan] + [1.0, 2.0] * 20, FitStatus.NOT_FINITE),
        ([np.inf] + [1.0, 2.0] * 20, FitStatus.NOT_FINITE),
    ],
)
def test_a_failed_fit_is_nan_with_a_sentence(values: list[float], status: FitStatus) -> None:
    fit = fit_power_law(values)
    assert fit.status is status
    assert fit.status.sentence
    assert all(np.isnan(number) for number in (fit.alpha, fit.xmin, fit.ks_d, fit.sigma))
    assert fit.n_tail == 0

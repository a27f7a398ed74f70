"""The fit at every xmin: its smallest distance is the fit, and what lies near it is the sensitivity."""

from __future__ import annotations

import numpy as np
import pytest

from htsr.numerics.powerlaw import fit_power_law
from htsr.numerics.thresholds import alpha_average, alpha_range, ks_curve


@pytest.mark.parametrize("seed", range(5))
def test_the_lowest_point_of_the_curve_is_the_fit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.exp(rng.uniform(0.5, 2) * rng.standard_normal(300))
    curve, fit = ks_curve(x), fit_power_law(x)
    best = int(np.argmin(curve.ks_d))
    assert curve.ks_d[best] == pytest.approx(fit.ks_d, rel=1e-9)
    assert curve.alpha[best] == pytest.approx(fit.alpha, rel=1e-9)
    assert curve.xmin[best] == pytest.approx(fit.xmin, rel=1e-12)
    assert curve.n[best] == fit.n_tail
    low, high = alpha_range(curve)
    assert low <= fit.alpha * (1 + 1e-12)
    assert high >= fit.alpha * (1 - 1e-12)


def test_every_point_of_the_curve_is_the_formula() -> None:
    x = np.sort(np.random.default_rng(0).pareto(2, 40) + 1)
    curve = ks_curve(x)
    for i in range(39):
        tail, n = x[i:], 40 - i
        alpha = 1 + n / sum(np.log(tail / tail[0]))
        gaps = [abs(1 - (t / tail[0]) ** (1 - alpha) - j / n) for j, t in enumerate(tail)]
        assert (curve.alpha[i], curve.ks_d[i]) == pytest.approx((alpha, max(gaps)), rel=1e-9)


def test_range_holds_every_threshold_within_five_percent() -> None:
    curve = ks_curve(np.random.default_rng(3).pareto(2, 200) + 1)
    near = [a for a, d in zip(curve.alpha, curve.ks_d, strict=True) if d <= 1.05 * min(curve.ks_d)]
    assert alpha_range(curve) == (min(near), max(near))


@pytest.mark.parametrize(("size", "alpha"), [(100, 2.0), (100, 4.0), (384, 3.0)])
def test_average_has_less_bias_and_spread_than_the_fit(size: int, alpha: float) -> None:
    rng = np.random.default_rng(size)
    samples = [rng.pareto(alpha - 1, size) + 1 for _ in range(150)]
    averages = np.array([alpha_average(ks_curve(x)) for x in samples])
    fits = np.array([fit_power_law(x).alpha for x in samples])
    assert abs(averages.mean() - alpha) < 3 * averages.std() / np.sqrt(150) + 0.01 * alpha
    assert averages.std() < fits.std()


def test_a_spectrum_without_thresholds_has_no_numbers() -> None:
    for x in (np.full(50, 2.0), np.arange(1.0, 10.0)):
        curve = ks_curve(x)
        assert len(curve.xmin) == 0
        assert np.isnan([*alpha_range(curve), alpha_average(curve)]).all()

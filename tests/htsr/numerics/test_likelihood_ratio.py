"""Vuong's test: the powerlaw package as oracle, planted laws, and the lognormal's limit."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from htsr.numerics import likelihood_ratio
from htsr.numerics.likelihood_ratio import against_exponential, against_lognormal


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lognormal", "exponential"])
def test_ratios_agree_with_the_powerlaw_package(kind: str) -> None:
    package = pytest.importorskip("powerlaw")
    rng = np.random.default_rng(0)
    x = np.exp(rng.normal(size=900)) if kind == "lognormal" else rng.exponential(size=900) + 0.2
    xmin = float(np.median(x))
    theirs = package.Fit(x, xmin=xmin, xmax=None, verbose=False)
    for name, ours in (("lognormal", against_lognormal), ("exponential", against_exponential)):
        z, p = theirs.distribution_compare("power_law", name, normalized_ratio=True)
        found = ours(x[x >= xmin], xmin)
        assert found.z == pytest.approx(z, abs=0.02)  # their optimiser stops earlier
        assert found.p == pytest.approx(p, abs=0.01)


def test_planted_laws_are_recognised() -> None:
    rng = np.random.default_rng(1)
    power, normal, exponential = rng.pareto(1.5, 2000) + 1, np.exp(rng.normal(size=4000)), rng.exponential(size=4000)
    assert against_exponential(power, 1.0).z > 3
    assert against_lognormal(power, 1.0).p > 0.05
    assert against_lognormal(normal[normal >= 0.5], 0.5).z < -3
    assert against_exponential(exponential[exponential >= 0.1], 0.1).z < -3


def test_a_tail_heavier_than_any_lognormal_is_undecided() -> None:
    y = np.random.default_rng(2).exponential(size=2000) ** 1.5  # ln x with a tail above exponential
    found = against_lognormal(np.exp(y), 1.0)
    assert (found.z, found.p) == (0.0, 1.0)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1e-4), (1.0, 0.3), (-4.0, 1.0), (-30.0, 2.0), (20.0, 5.0), (0.0, 1.0)])
def test_normaliser_and_gradient_are_the_integrals(a: float, b: float) -> None:
    moments = [quad(lambda u, k=k: u**k * np.exp(-a * u - b * u * u), 0, np.inf, epsabs=0, limit=200,
                    points=None)[0] for k in range(3)]  # fmt: skip
    assert likelihood_ratio._log_normaliser(a, b) == pytest.approx(np.log(moments[0]), rel=1e-7, abs=1e-7)
    _, gradient = likelihood_ratio._minus_mean_log_density(np.array([a, b]), 0.0, 0.0)
    assert (-gradient).tolist() == pytest.approx([moments[1] / moments[0], moments[2] / moments[0]], rel=1e-5)


def test_scale_does_not_matter_and_few_points_have_no_verdict() -> None:
    x = np.exp(np.random.default_rng(3).normal(size=500)) + 1
    once, scaled = against_lognormal(x, 1.0), against_lognormal(1024 * x, 1024.0)
    assert (scaled.z, scaled.p) == pytest.approx((once.z, once.p), rel=1e-6)
    assert np.isnan(against_exponential(x[:4], 1.0).z)
    assert np.isnan(against_lognormal(x[:4], 1.0).p)

"""The tabulated law against the differential equation it comes from, its known moments and quantiles."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp
from scipy.special import airy

from htsr.numerics.tracy_widom import tracy_widom_survival


def test_survival_solves_the_painleve_equation() -> None:
    points, start = [3.0, 1.37, -0.05, -2.0, -3.61], 7.0
    integrands = (lambda x: airy(x)[0] ** 2, lambda x: (x - start) * airy(x)[0] ** 2, lambda x: airy(x)[0])
    tails = [quad(f, start, 40, epsrel=1e-12, epsabs=0)[0] for f in integrands]
    solved = solve_ivp(
        lambda s, y: [y[1], s * y[0] + 2 * y[0] ** 3, -y[0] ** 2, -y[2], -y[0]],
        (start, points[-1]), [airy(start)[0], airy(start)[1], *tails], "DOP853", points, rtol=1e-12, atol=1e-20,
    )  # fmt: skip
    expected = 1 - np.exp(-(solved.y[3] + solved.y[4]) / 2)
    assert [tracy_widom_survival(s) for s in points] == pytest.approx(expected.tolist(), rel=2e-5)


@pytest.mark.parametrize(("quantile", "p"), [(-1.2686, 0.5), (0.4501, 0.1), (0.9793, 0.05), (2.0234, 0.01)])
def test_known_quantiles(quantile: float, p: float) -> None:
    assert tracy_widom_survival(quantile) == pytest.approx(p, rel=5e-4)


def test_known_mean_and_variance() -> None:
    s = np.linspace(-5, 12, 4001)
    survival = np.array([tracy_widom_survival(v) for v in s])
    density, middle = -np.diff(survival), (s[1:] + s[:-1]) / 2
    mean = np.sum(middle * density)
    assert mean == pytest.approx(-1.2065336, abs=2e-3)
    assert np.sum((middle - mean) ** 2 * density) == pytest.approx(1.6077810, abs=1e-2)


def test_survival_falls_from_one_and_keeps_nan() -> None:
    values = [tracy_widom_survival(s) for s in np.linspace(-8, 14, 500)]
    assert values[0] == 1.0
    assert np.all(np.diff(values) <= 0)
    assert 0 < values[-1] < 1e-12
    assert np.isnan(tracy_widom_survival(np.nan))

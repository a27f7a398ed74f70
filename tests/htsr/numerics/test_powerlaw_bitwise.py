"""500 random spectra of 8 to 5,000 points, ties and extremes included: the exhaustive fit bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paper
import pytest

from htsr.numerics.powerlaw import ALPHA_LIMIT, FitStatus, fit_power_law

Draw = Callable[[np.random.Generator, int], np.ndarray]
KINDS: dict[str, Draw] = {
    "pure tail": lambda rng, n: rng.pareto(rng.uniform(0.5, 7), n) + 1,
    "gaussian bulk": lambda rng, n: np.square(rng.standard_normal((n, 4))).sum(axis=1),
    "wide lognormal": lambda rng, n: np.exp(rng.uniform(0.1, 6) * rng.standard_normal(n)),
    "bulk and tail": lambda rng, n: np.concatenate([rng.uniform(0.1, 1, n - n // 3), rng.pareto(1.2, n // 3) + 1]),
    "rounded, many ties": lambda rng, n: np.round(rng.pareto(2, n) + 1, 1),
    "every value three times": lambda rng, n: np.repeat(rng.lognormal(size=n // 3 + 1), 3)[:n],
    "a plateau": lambda rng, n: np.concatenate([np.full(n // 2, 0.5), rng.pareto(1.5, n - n // 2) + 0.5]),
    "300 orders of magnitude": lambda rng, n: 10.0 ** rng.uniform(-150, 150, n),
    "nearly equal": lambda rng, n: 1 + rng.uniform(0, 1e-7, n),
    "one giant": lambda rng, n: np.append(rng.uniform(1, 2, n - 1), 1e30),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fit_equals_the_exhaustive_fit_bit_for_bit(kind: str) -> None:
    rng = np.random.default_rng(list(KINDS).index(kind))
    sizes = np.exp(np.log(8) + np.log(5000 / 8) * rng.uniform(size=49) ** 1.5).astype(int)
    for size in (5000, *sizes.tolist()):
        x = KINDS[kind](rng, size)
        assert len(x) == size
        with np.errstate(over="ignore"):
            alpha, xmin, ks_d, sigma, _ = paper.exhaustive_power_law(x)
        fit = fit_power_law(x)
        if not 1 < alpha < ALPHA_LIMIT:  # the exhaustive fit reports a tail without spread as a success
            assert fit.status is FitStatus.DEGENERATE
            continue
        assert (fit.alpha, fit.xmin, fit.ks_d, fit.sigma) == (alpha, xmin, ks_d, sigma)
        assert fit.n_tail == np.count_nonzero(x >= xmin)

"""Goodness of fit: a power law passes at the stated rate, something else does not."""

from __future__ import annotations

import numpy as np
import pytest

from htsr.numerics.goodness import goodness_of_fit


def test_a_power_law_is_rejected_no_more_often_than_stated() -> None:
    rng = np.random.default_rng(0)
    p = [goodness_of_fit(rng.pareto(2, 200) + 1, rng, replicas=99) for _ in range(60)]
    assert sum(value < 0.1 for value in p) <= 13  # 10 % of 60 and three standard errors
    assert np.mean(p) == pytest.approx(0.5, abs=0.15)


def test_a_bulk_without_a_tail_is_rejected() -> None:
    rng = np.random.default_rng(1)
    p = [goodness_of_fit(rng.uniform(1, 2, 2000), rng, replicas=99) for _ in range(10)]
    assert sum(value < 0.1 for value in p) >= 8


def test_p_is_never_zero_and_a_function_of_the_seed() -> None:
    x = np.random.default_rng(2).uniform(1, 2, 2000)
    p = [goodness_of_fit(x, np.random.default_rng(3), replicas=19) for _ in range(2)]
    assert p[0] == p[1] >= 1 / 20
    assert np.isnan(goodness_of_fit(np.full(50, 2.0), np.random.default_rng(0)))

"""The bootstrap interval of alpha: it covers as often as it says, and is fast enough to be used."""

from __future__ import annotations

import time

import numpy as np
import pytest

from htsr.numerics.bootstrap import alpha_interval


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 4.0, 6.0, 8.0])
def test_interval_covers_the_true_exponent_at_its_rate(alpha: float) -> None:
    rng = np.random.default_rng(round(10 * alpha))
    intervals = [alpha_interval(rng.pareto(alpha - 1, 256) + 1, rng) for _ in range(60)]
    covered = sum(i.low <= alpha <= i.high for i in intervals)
    assert covered >= 51  # 95 % of 60 are 57; under 51 has a chance of 0.2 % at a coverage of 0.95


def test_interval_is_wider_than_sigma_says() -> None:
    rng = np.random.default_rng(0)
    x = rng.pareto(2, 512) + 1
    interval = alpha_interval(x, rng)
    assert interval.high - interval.low > 2 * 1.96 * 2 / np.sqrt(512)  # sigma with all points in the tail


def test_interval_is_a_function_of_the_seed() -> None:
    x = np.random.default_rng(0).pareto(2, 300) + 1
    first, again, other = (alpha_interval(x, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first.low, first.high) == (again.low, again.high)
    assert first.low != other.low


def test_shares_count_replicas() -> None:
    x = np.random.default_rng(0).pareto(2, 300) + 1
    interval = alpha_interval(x, np.random.default_rng(1))
    parts = [interval.share(a, b) for a, b in ((-np.inf, 2), (2, 4), (4, 6), (6, np.inf))]
    assert sum(parts) == pytest.approx(1)
    assert parts[1] > 0.9


def test_no_fit_no_interval() -> None:
    for values in ([2.0] * 40, [1.0, 2.0, 3.0], []):
        interval = alpha_interval(np.array(values), np.random.default_rng(0))
        assert np.isnan([interval.low, interval.high, interval.share(0, 9)]).all()


def test_a_spectrum_of_2048_takes_at_most_a_tenth_of_a_second() -> None:
    rng = np.random.default_rng(0)
    x = rng.pareto(2, 2048) + 1  # a pure tail is the hardest case
    times = []
    for _ in range(3):
        start = time.thread_time()
        alpha_interval(x, rng)
        times.append(time.thread_time() - start)
    assert min(times) < 0.1  # 0.03 measured

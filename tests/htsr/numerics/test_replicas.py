"""Many fits at once: the same estimator as the fit of one, on samples and on their resamples with ties."""

from __future__ import annotations

import numpy as np
import pytest

from htsr.numerics import replicas
from htsr.numerics.powerlaw import fit_power_law
from htsr.numerics.replicas import fit_replicas

SAMPLES = {
    "pareto": lambda rng, n: rng.pareto(2.5, n) + 1,
    "gaussian matrix": lambda rng, n: np.linalg.svd(rng.standard_normal((n, n + 30)), compute_uv=False) ** 2,
    "lognormal": lambda rng, n: np.exp(2 * rng.standard_normal(n)),
    "bulk and tail": lambda rng, n: np.concatenate([rng.uniform(0.1, 1, n - n // 4), rng.pareto(1.5, n // 4) + 1]),
}


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("size", [20, 21, 130, 700])
def test_each_row_is_the_fit_of_that_row(kind: str, size: int) -> None:
    rng = np.random.default_rng(size)
    x = np.sort(SAMPLES[kind](rng, size))
    samples = np.sort(x[rng.integers(0, size, (12, size))], axis=1)  # with ties, as a bootstrap draws them
    samples[0] = x
    found = fit_replicas(np.log(samples))
    for row, sample in enumerate(samples):
        fit = fit_power_law(sample)
        assert found.ks_d[row] == pytest.approx(fit.ks_d, abs=1e-10)
        assert found.alpha[row] == pytest.approx(fit.alpha, rel=1e-8)
        assert sample[found.start[row]] == fit.xmin


def test_the_batch_does_not_change_a_fit() -> None:
    log_x = np.sort(np.random.default_rng(0).exponential(size=(300, 1000)), axis=1)  # several batches
    together, alone = fit_replicas(log_x), fit_replicas(log_x[250:251])
    assert (together.alpha[250], together.ks_d[250]) == (alone.alpha[0], alone.ks_d[0])


@pytest.mark.parametrize("probes", [1, 2, 40])
def test_the_number_of_probes_changes_no_fit(probes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log_x = np.sort(np.random.default_rng(1).exponential(size=(20, 200)), axis=1)
    usual = fit_replicas(log_x)
    monkeypatch.setattr(replicas, "NUM_PROBES", probes)
    found = fit_replicas(log_x)
    assert np.array_equal(found.start, usual.start)
    assert np.array_equal(found.alpha, usual.alpha)
    assert found.ks_d == pytest.approx(usual.ks_d, abs=1e-14)


def test_equal_points_are_never_a_tail() -> None:
    x = np.concatenate([np.linspace(1, 2, 40), np.full(15, 3.0)])
    found = fit_replicas(np.log(x)[None])
    assert np.isfinite(found.alpha[0])
    assert x[found.start[0]] < 3


def test_small_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 20"):
        fit_replicas(np.zeros((3, 19)))

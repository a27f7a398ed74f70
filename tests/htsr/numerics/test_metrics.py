"""Metrics of a spectrum on cases with a closed form, and weightwatcher's numbers on real layers."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from htsr.matrix_row import measure
from htsr.numerics.metrics import alpha_hill, matrix_entropy, matrix_rank, spectrum_metrics
from htsr.numerics.spectrum import eigenvalues


def test_a_flat_spectrum_has_closed_forms() -> None:
    metrics = spectrum_metrics(np.full(32, 4.0), 64)
    assert metrics.log10_norm == pytest.approx(np.log10(128))
    assert metrics.log10_spectral_norm == pytest.approx(np.log10(4))
    assert metrics.stable_rank == pytest.approx(32)
    assert metrics.entropy == pytest.approx(1, abs=1e-6)
    assert np.isnan(metrics.alpha_hill)


def test_what_does_not_exist_is_nan_and_never_minus_one() -> None:
    zero, rank_one = spectrum_metrics(np.zeros(8), 9), spectrum_metrics(np.array([0.0, 0, 0, 7]), 9)
    assert np.isnan([zero.log10_norm, zero.log10_spectral_norm, zero.stable_rank, zero.entropy]).all()
    assert zero.lambda_max == 0
    assert rank_one.stable_rank == 1
    assert np.isnan(rank_one.entropy)


def test_alpha_hill_is_the_definition_term_by_term() -> None:
    x = np.sort(np.random.default_rng(0).pareto(2, 101) + 1)
    i, n = int(len(x) / 2), len(x)
    spread = sum(np.log(x[j]) - np.log(x[i]) for j in range(i, n))
    assert alpha_hill(x) == pytest.approx(1 + (n - i) / spread, rel=1e-12)


def test_alpha_hill_recovers_a_planted_slope() -> None:
    rng = np.random.default_rng(1)
    found = [alpha_hill(np.sort(rng.pareto(2.0, 1024) + 1)) for _ in range(30)]
    assert np.mean(found) == pytest.approx(3.0, abs=4 * 0.088 / np.sqrt(30))


def test_rank_counts_what_rounding_leaves() -> None:
    values = np.sort(np.concatenate([np.zeros(3), np.random.default_rng(2).pareto(2, 20) + 1]))
    assert matrix_rank(values, 100) == 20
    assert matrix_entropy(values, 100) < 1


def reference_rows(model: nn.Module) -> dict[str, dict]:
    """weightwatcher's own table, silenced."""
    ww = pytest.importorskip("weightwatcher")
    level = logging.root.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        table = ww.WeightWatcher(model=model, log_level=logging.ERROR).analyze()
    logging.root.setLevel(level)
    return {row["longname"]: row for row in table.to_dict("records")}


def test_every_metric_means_what_weightwatcher_means() -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = [(64, 48), (48, 64), (30, 30), (200, 20), (16, 90), (12, 12), (9, 40)]
    model = nn.Sequential(*(nn.Linear(cols, rows, bias=False) for rows, cols in shapes))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng) ** 3)
    names = {
        "alpha": "alpha", "alpha_sigma": "sigma", "ks_d": "D", "xmin": "xmin", "n_tail": "num_pl_spikes",
        "alpha_hat": "alpha_weighted", "log10_norm": "log_norm", "log10_spectral_norm": "log_spectral_norm",
        "lambda_max": "lambda_max", "stable_rank": "stable_rank", "entropy": "entropy",
    }  # fmt: skip
    theirs = reference_rows(model)
    assert len(theirs) == len(shapes)
    for name, layer in model.named_children():
        ours = measure(eigenvalues(layer.weight), max(layer.weight.shape))
        for column, reference in names.items():
            assert ours[column] == pytest.approx(theirs[name][reference], rel=1e-9), (name, column)

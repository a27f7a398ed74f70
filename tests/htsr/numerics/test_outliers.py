"""Outlier counts without a score matrix, against OWL's definition with one."""

from __future__ import annotations

from unittest import mock

import makers
import numpy as np
import paper
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from htsr.numerics import outliers
from htsr.numerics.outliers import column_sums, compared_in, count_above, percent, thresholds

TAUS = (0.5, 2.0, 5.0, 13.0)


def heavy(rows: int, cols: int, seed: int) -> Tensor:
    g = makers.generator(seed)
    return torch.randn(rows, cols, generator=g) / torch.rand(rows, 1, generator=g)


def pooled_lod(weights: list[Tensor], norms: list[Tensor], taus: tuple[float, ...]) -> list[float]:
    numel = sum(w.numel() for w in weights)
    total = sum(float(column_sums(w) @ n.double()) for w, n in zip(weights, norms, strict=True))
    limits = [tau * total / numel for tau in taus]
    counts = sum(
        count_above(w, [thresholds(limit, n, compared_in(w)) for limit in limits])
        for w, n in zip(weights, norms, strict=True)
    )
    return [percent(int(c), numel, limit) for c, limit in zip(counts, limits, strict=True)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pooled_lod_equals_the_papers_definition_at_several_taus(seed: int) -> None:
    weights = [heavy(40, 24, seed), heavy(96, 24, seed + 10), heavy(24, 96, seed + 20)]
    inputs = [[torch.randn(50, w.shape[1], generator=makers.generator(9)) for _ in range(3)] for w in weights]
    norms = [sum(x.double().square().sum(0) for x in samples).sqrt() for samples in inputs]
    expected = [paper.owl_lod(weights, inputs, tau) for tau in TAUS]
    assert pooled_lod(weights, norms, TAUS) == pytest.approx(expected, rel=1e-6)
    assert expected[0] > expected[2] > 0


def test_an_importance_equal_to_the_limit_is_no_outlier() -> None:
    weights = torch.ones(4, 4)
    assert pooled_lod([weights], [torch.ones(4)], (1.0, 0.999)) == [0.0, 100.0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40), st.integers(0, 99))
def test_the_size_of_the_slices_changes_nothing(rows: int, cols: int, step: int, seed: int) -> None:
    weights, norms = heavy(rows, cols, seed), torch.rand(cols, generator=makers.generator(seed))
    whole = column_sums(weights)
    limits = [float(whole @ norms.double()) / weights.numel() * tau for tau in TAUS]
    levels = [thresholds(limit, norms, torch.float32) for limit in limits]
    counts = count_above(weights, levels).tolist()
    with mock.patch.object(outliers, "SLICE_ELEMENTS", step * cols):
        assert column_sums(weights).numpy() == pytest.approx(whole.numpy(), rel=1e-12)
        assert count_above(weights, levels).tolist() == counts


SIZES, NORMS = st.floats(0, 2.0**100, width=32), st.just(0.0) | st.floats(1e-20, 1e20)


@settings(max_examples=300, deadline=None)
@given(st.floats(1e-30, 1e30), NORMS, st.sampled_from([torch.float32, torch.float64]), SIZES)
def test_a_threshold_is_the_last_number_whose_importance_is_not_above_the_limit(
    limit: float, norm: float, dtype: torch.dtype, size: float
) -> None:
    n = torch.tensor([norm], dtype=torch.float64)
    t = thresholds(limit, n, dtype)
    assert t.dtype == dtype
    above = torch.nextafter(t, torch.full_like(t, torch.inf))
    for w in (t, above, torch.nextafter(t, torch.zeros_like(t)), torch.tensor([size], dtype=dtype)):
        if w.isfinite():
            assert bool(w > t) == bool(w.double() * n > limit)


def test_at_and_around_ties_thresholds_count_what_the_product_in_double_precision_counts() -> None:
    g = makers.generator(1)
    norms = torch.rand(400, generator=g, dtype=torch.float64) + 0.1
    for limit in (0.3, 1.0, 13.7):
        tie = (limit / norms).float()
        near = [torch.nextafter(tie, torch.full_like(tie, end)) for end in (-torch.inf, torch.inf)]
        weights = torch.stack([tie, -tie, *near])
        exact = int((weights.abs().double() * norms > limit).sum())
        assert count_above(weights, [thresholds(limit, norms, torch.float32)])[0] == exact > 0


def test_scaling_weights_or_norms_changes_no_lod() -> None:
    weights, norms = heavy(64, 32, 3), torch.rand(32, generator=makers.generator(4))
    lod = pooled_lod([weights], [norms], TAUS)
    assert pooled_lod([8 * weights], [norms], TAUS) == lod
    assert pooled_lod([weights], [4 * norms], TAUS) == lod


def test_half_precision_weights_are_compared_in_double_precision() -> None:
    weights = heavy(64, 32, 6).to(torch.bfloat16)
    norms = torch.rand(32, generator=makers.generator(7))
    assert pooled_lod([weights], [norms], TAUS) == pooled_lod([weights.double()], [norms], TAUS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_leaves_the_lod_unknown(bad: float) -> None:
    weights = heavy(16, 16, 8)
    weights[3, 3] = bad
    assert np.isnan(pooled_lod([weights], [torch.ones(16)], TAUS)).all()


def test_a_zero_matrix_has_no_outliers() -> None:
    assert pooled_lod([torch.zeros(5, 5)], [torch.ones(5)], TAUS) == [0.0] * 4


def test_other_shapes_than_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a matrix"):
        column_sums(torch.ones(2, 3, 4))

"""LOD by halves of the text: the record of how far they differ, and rank correlation by its textbook definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from htsr.model.convergence import convergence, rank_correlation


def test_the_block_that_moves_most_is_named_with_its_change_relative_to_its_mean() -> None:
    found = convergence([(1.0, 1.0), (0.2, 0.3), (5.0, 4.0)], 7)
    assert found is not None
    assert (found.windows, found.block) == ((4, 3), 1)
    assert found.largest_change == pytest.approx(0.1 / 0.25)
    assert found.spearman == 1.0


def test_blocks_without_outliers_or_numbers_move_nothing() -> None:
    found = convergence([(0.0, 0.0), (np.nan, 1.0), (1.0, 1.5)], 2)
    assert found is not None
    assert (found.block, found.largest_change) == (2, pytest.approx(0.4))
    assert np.isnan(found.spearman)
    assert found.record()["spearman"] is None
    nothing = convergence([(0.0, 0.0)], 2)
    assert nothing is not None
    assert nothing.record() == {"windows": (1, 1), "spearman": None, "largest_change": None, "block": None}


def test_one_window_has_no_halves() -> None:
    assert convergence([(1.0, 0.0)], 1) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
def test_rank_correlation_is_scipys_spearman_ties_included(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=float).T
    if np.ptp(a) and np.ptp(b):
        assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    else:
        assert np.isnan(rank_correlation(a, b))

"""GRASS: the table of a period is a function of the norms recorded before it."""

import numpy as np
import pytest
from makers import save_tiny

import owlore
from owlore.sampling import draw, inclusion
from owlore.strategies.base import PeriodStats
from owlore.strategies.grass import FLOOR_SHARE, smoothed_norms, softmax_weights

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]
SIZES = np.array([100.0, 100.0, 400.0, 100.0])


def past(period, blocks, norms, steps=5):
    return PeriodStats(period=period, steps=steps, blocks=list(blocks), norms=list(norms))


def test_norms_are_a_parameter_and_follow_the_papers_average():
    """m = sqrt(|g|^2 / N); drawn again: m <- s m_new + (1 - s) m; undrawn: as it was (forget 0)."""
    seen = [past(0, (0, 2), (2.0, 2.0)), past(1, (0, 1), (4.0, 1.0))]
    found = smoothed_norms(seen, SIZES, smoothing=0.25, forget=0.0)
    assert found[:3] == pytest.approx([0.25 * 0.4 + 0.75 * 0.2, 0.1, 0.1])
    assert found[3] == pytest.approx(np.mean(found[:3]))  # never seen: the mean of those seen


def test_what_is_not_drawn_goes_back_towards_the_mean():
    seen = [past(0, (0, 1, 2, 3), (1.0, 2.0, 6.0, 4.0))]
    later = [*seen, past(1, (3,), (4.0,))]
    before, after = (smoothed_norms(p, SIZES, smoothing=0.5, forget=0.2) for p in (seen, later))
    assert after[:3] == pytest.approx(before[:3] + 0.2 * (before.mean() - before[:3]))
    assert after[3] == pytest.approx(before[3])


def test_a_period_without_a_gradient_says_nothing():
    seen = [past(0, (0,), (1.0,))]
    assert smoothed_norms([*seen, past(1, (1,), (0.0,), steps=0)], SIZES, smoothing=0.5, forget=0.3) == pytest.approx(
        smoothed_norms(seen, SIZES, smoothing=0.5, forget=0.3)
    )
    assert smoothed_norms([], SIZES, smoothing=0.5, forget=0.3).tolist() == [1.0] * 4


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_softmax_does_not_depend_on_the_size_of_gradients(scale):
    norms = np.array([0.5, 1.0, 1.5])
    weights = softmax_weights(norms * scale, 0.5)
    assert weights / weights.sum() == pytest.approx(np.exp(norms / 0.5) / np.exp(norms / 0.5).sum())
    assert softmax_weights(np.zeros(3), 1.0).tolist() == [1, 1, 1]


def test_a_runs_tables_and_draws_are_those_of_its_record(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=5, width=64)
    run = owlore.train(model, ROWS, method="grass", steps=12, every=2, lr=1e-2, set={"temperature": 0.3},
                       out=tmp_path / "run")  # fmt: skip
    record = run.record
    tables, seen = record["tables"], [PeriodStats(**row) for row in record["periods"]]
    size = sum(p.numel() for p in run.model.model.layers[0].parameters())
    for period, table in enumerate(tables):
        norms = smoothed_norms(seen[:period], np.full(5, float(size)), smoothing=0.5, forget=0.1)
        expected = inclusion(softmax_weights(norms, 0.3), 2, FLOOR_SHARE * 2 / 5)
        assert table == pytest.approx(expected.tolist())
        assert list(draw(np.array(table), 0, period)) == seen[period].blocks
        assert min(table) >= FLOOR_SHARE * 2 / 5 - 1e-12 and sum(table) == pytest.approx(2)
    assert len(tables) == 6 and tables[0] == [0.4] * 5 and len({tuple(t) for t in tables}) > 3


def test_floor_is_the_option_that_the_user_gives(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=5, width=64)
    run = owlore.train(model, ROWS, method="grass", steps=6, every=2, lr=1e-2, floor=0.35, out=tmp_path / "run")
    assert all(min(table) >= 0.35 - 1e-12 for table in run.record["tables"])

"""Every arrangement shows every row once an epoch, as a pure function of (seed, step) and the lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlore.data.arrange import WINDOW_STEPS, Arrangement, Grouped
from owlore.data.batches import step_rows


def lengths_of(n, seed=0):
    return np.random.default_rng(seed).integers(1, 200, n)


def rows_of(arrangement, steps):
    """Row indexes of the steps, flat."""
    return [row for t in steps for micro in arrangement.step(t) for sequence in micro for row in sequence]


def padding(lengths, arrangement, steps):
    """Share of padded positions over the micro-batches of the steps."""
    held = filled = 0
    for t in steps:
        for micro in arrangement.step(t):
            widths = [int(lengths[list(sequence)].sum()) for sequence in micro]
            held += max(widths) * len(widths)
            filled += sum(widths)
    return 1 - filled / held


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99), st.integers(1, 30))
def test_without_an_option_rows_come_as_step_rows_says(n, batch, accum, seed, step):
    plain = Arrangement(lengths_of(n), seed=seed, batch=batch, accum=accum, epochs=None)
    expected = step_rows(step, batch=batch, accum=accum, n=n, seed=seed)
    assert plain.step(step) == [[(row,) for row in micro] for micro in expected]
    assert plain.steps is None


@given(st.integers(1, 500), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_grouping_shows_every_row_once_an_epoch(n, batch, accum, epochs, seed):
    grouped = Grouped(lengths_of(n), seed=seed, batch=batch, accum=accum, epochs=epochs)
    plain = Arrangement(lengths_of(n), seed=seed, batch=batch, accum=accum, epochs=epochs)
    assert grouped.steps == plain.steps
    flat = rows_of(grouped, range(1, grouped.steps + 1))
    assert len(flat) == epochs * n
    for epoch in range(epochs):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert grouped.epoch(grouped.steps) == epochs


@given(st.integers(1, 40), st.integers(5, 400), st.integers(0, 9))
def test_accumulation_of_grouped_rows_shows_the_rows_of_the_big_batch(step, n, seed):
    parts = Grouped(lengths_of(n), seed=seed, batch=2, accum=4, epochs=None).step(step)
    (whole,) = Grouped(lengths_of(n), seed=seed, batch=8, accum=1, epochs=None).step(step)
    assert [sequence for part in parts for sequence in part] == whole
    assert [len(part) for part in parts] == [2] * 4


def test_grouping_is_pure_and_does_not_depend_on_where_the_run_ends():
    lengths = lengths_of(300)
    one = Grouped(lengths, seed=3, batch=4, accum=2, epochs=None)
    forwards = [one.step(t) for t in range(1, 120)]
    other = Grouped(lengths, seed=3, batch=4, accum=2, epochs=5.0)
    assert forwards == [other.step(t) for t in reversed(range(1, 120))][::-1]
    assert forwards != [Grouped(lengths, seed=4, batch=4, accum=2, epochs=None).step(t) for t in range(1, 120)]


@pytest.mark.parametrize("accum", [1, 4])
def test_grouping_saves_nearly_all_padding_and_stays_shuffled(accum):
    lengths, steps = lengths_of(4 * accum * 200), range(1, 201)
    plain = Arrangement(lengths, seed=0, batch=4, accum=accum, epochs=None)
    grouped = Grouped(lengths, seed=0, batch=4, accum=accum, epochs=None)
    assert padding(lengths, plain, steps) > 0.3
    assert padding(lengths, grouped, steps) < 0.03
    sizes = [lengths[rows_of(grouped, [t])].mean() for t in steps]
    assert abs(np.corrcoef(np.arange(len(sizes)), sizes)[0, 1]) < 0.25  # long and short steps come in no order
    window = set(rows_of(grouped, range(1, WINDOW_STEPS + 1)))
    assert window == set(rows_of(plain, range(1, WINDOW_STEPS + 1)))  # a row moves by a window at most

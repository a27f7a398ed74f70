"""Every arrangement shows every row once an epoch, as a pure function of (seed, step) and the lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlore.data.arrange import WINDOW_STEPS, Arrangement, Grouped
from owlore.data.batches import step_rows
from owlore.data.packing import OPEN_SEQUENCES, Packed, first_fit


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


def literal_first_fit(lengths, rows, capacity):
    """As in a textbook, with every sequence open for ever."""
    packed = []
    for row in rows:
        for sequence in packed:
            if sum(lengths[r] for r in sequence) + lengths[row] <= capacity:
                sequence.append(row)
                break
        else:
            packed.append([row])
    return packed


@given(st.lists(st.integers(1, 50), min_size=1, max_size=OPEN_SEQUENCES), st.integers(50, 120))
def test_packing_is_first_fit(lengths, capacity):
    found = first_fit(np.array(lengths), np.arange(len(lengths)), capacity)
    assert [list(sequence) for sequence in found] == literal_first_fit(lengths, range(len(lengths)), capacity)


@given(st.integers(1, 300), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_packing_shows_every_row_once_an_epoch_and_fits(n, batch, accum, epochs, seed):
    lengths = lengths_of(n)
    packed = Packed(lengths, seed=seed, batch=batch, accum=accum, epochs=epochs, capacity=256)
    steps = [packed.step(t) for t in range(1, packed.steps + 1)]
    assert all(steps), "no step is empty"
    assert all(lengths[list(s)].sum() <= 256 for parts in steps for micro in parts for s in micro)
    flat = rows_of(packed, range(1, packed.steps + 1))
    assert len(flat) == epochs * n
    for epoch in range(epochs):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert packed.epoch(packed.steps) == epochs


def test_packing_is_pure_and_does_not_depend_on_where_the_run_ends():
    lengths = lengths_of(300)
    one = Packed(lengths, seed=3, batch=4, accum=2, epochs=None, capacity=512)
    other = Packed(lengths, seed=3, batch=4, accum=2, epochs=9.0, capacity=512)
    assert [one.step(t) for t in range(1, 60)] == [other.step(t) for t in reversed(range(1, 60))][::-1]
    assert [one.epoch(t) for t in range(1, 60)] == [other.epoch(t) for t in range(1, 60)]
    (whole,) = Packed(lengths, seed=3, batch=8, accum=1, epochs=None, capacity=512).step(7)
    assert [sequence for part in one.step(7) for sequence in part] == whole


@pytest.mark.parametrize("epochs", [0.01, 0.5, 1.3])
def test_a_part_of_an_epoch_is_at_least_its_share_of_the_rows(epochs):
    packed = Packed(lengths_of(200), seed=0, batch=1, accum=1, epochs=epochs, capacity=256)
    assert packed.epoch(packed.steps - 1) < epochs <= packed.epoch(packed.steps)


def test_packed_sequences_are_nearly_full():
    lengths = lengths_of(5000)
    packed = Packed(lengths, seed=0, batch=4, accum=1, epochs=1, capacity=512)
    assert lengths.sum() / (512 * packed.total) > 0.97

"""The order is a pure function of (seed, step); batches are padded, never mixed up."""

from __future__ import annotations

from typing import Any

import makers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from htsr.errors import BadInput
from owlore.data.batches import collate, epoch_at, length_batches, num_steps, order, step_rows, total_rows
from owlore.data.examples import Example
from owlore.data.prepare import prepare, split
from owlore.data.tokenise import Encoded, encode


def encoded_rows(n: int = 12) -> Encoded:
    rows = [Example(prompt="the " * (1 + i % 3), answer="sky " * (1 + i % 5)) for i in range(n)]
    return encode(rows, makers.byte_tokenizer(), 64)


@given(st.integers(0, 2**63), st.integers(0, 50), st.integers(1, 300))
def test_an_order_is_a_permutation(seed: int, epoch: int, n: int) -> None:
    assert sorted(order(seed, epoch, n)) == list(range(n))


def test_orders_differ_by_epoch_and_by_seed_and_are_pure() -> None:
    drawn = {(seed, epoch): tuple(order(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(set(drawn.values())) == 16
    order.cache_clear()
    np.random.seed(0)  # noqa: NPY002 - global generators must not matter
    assert drawn == {key: tuple(order(*key, 50)) for key in reversed(drawn)}


def test_every_place_is_equally_likely() -> None:
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), order(seed, 0, 6)] += 1
    assert np.abs(counts - 500).max() < 4.5 * np.sqrt(500 * 5 / 6)


def test_the_order_does_not_change_between_versions() -> None:
    """Stored from numpy 2.4: Philox's raw draws are fixed by its definition, and so are SeedSequence's keys."""
    assert order(0, 0, 8).tolist() == [5, 6, 1, 4, 0, 2, 3, 7]
    assert order(7, 3, 8).tolist() == [3, 6, 2, 5, 1, 0, 4, 7]


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_all_steps_show_every_row_once_an_epoch(n: int, batch: int, accum: int, epochs: int, seed: int) -> None:
    steps = num_steps(n, epochs=epochs, batch=batch, accum=accum)
    total = total_rows(n, epochs)
    shown = [
        [row for micro in step_rows(t, batch=batch, accum=accum, n=n, seed=seed, total_rows=total) for row in micro]
        for t in range(1, steps + 1)
    ]
    assert all(shown), "no step is empty"
    flat = [row for rows in shown for row in rows]
    for epoch in range(epochs):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert len(flat) == epochs * n
    assert epoch_at(steps, batch=batch, accum=accum, n=n, total_rows=total) == epochs


@given(st.integers(1, 9), st.integers(5, 40), st.integers(0, 9))
def test_accumulation_shows_the_rows_of_the_big_batch(step: int, n: int, seed: int) -> None:
    parts = step_rows(step, batch=2, accum=4, n=n, seed=seed)
    (whole,) = step_rows(step, batch=8, accum=1, n=n, seed=seed)
    assert [len(part) for part in parts] == [2, 2, 2, 2]
    assert [row for part in parts for row in part] == whole


def test_a_step_may_hold_the_end_of_one_epoch_and_the_beginning_of_the_next() -> None:
    (rows,) = step_rows(2, batch=4, accum=1, n=6, seed=3)
    assert rows == [*order(3, 0, 6)[4:], *order(3, 1, 6)[:2]]


def test_steps_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        step_rows(0, batch=1, accum=1, n=3, seed=0)


@pytest.mark.parametrize(
    ("n", "epochs", "rows", "steps"),
    [(10, 1, 10, 2), (10, 0.5, 5, 1), (10, 1.01, 11, 2), (3, 0.01, 1, 1), (64, 2, 128, 16)],
)
def test_epochs_count_rows_and_steps(n: int, epochs: float, rows: int, steps: int) -> None:
    assert total_rows(n, epochs) == rows
    assert num_steps(n, epochs=epochs, batch=4, accum=2) == steps


def test_a_batch_is_padded_on_the_right_and_trains_what_the_masks_say() -> None:
    encoded = encoded_rows()
    batch = collate(encoded, [1, 4, 2])
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.shape[1] == max(len(encoded.row(i)[0]) for i in (1, 4, 2))
    for i, row in enumerate((1, 4, 2)):
        ids, trained = encoded.row(row)
        assert batch.input_ids[i, : len(ids)].tolist() == ids.tolist()
        assert (batch.input_ids[i, len(ids) :] == encoded.pad_id).all()
        assert (batch.labels[i, len(ids) :] == -100).all()
        assert batch.labels[i, : len(ids)].tolist() == [
            int(t) if m else -100 for t, m in zip(ids, trained, strict=True)
        ]
    assert batch.num_trained == int((batch.labels[:, 1:] != -100).sum()) == encoded.trained_per_row[[1, 4, 2]].sum()


def test_padding_changes_no_loss() -> None:
    model, encoded = makers.tiny_llama(), encoded_rows()
    rows = [0, 4, 9]

    def summed(batch: Any) -> float:
        with torch.no_grad():
            logits = model(batch.input_ids).logits[:, :-1]
        return float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
        )

    alone = sum(summed(collate(encoded, [row])) for row in rows)
    assert summed(collate(encoded, rows)) == pytest.approx(alone, rel=1e-5)


def test_evaluation_batches_hold_every_row_once() -> None:
    encoded = encoded_rows(23)
    batches = length_batches(encoded, 4)
    assert sorted(row for batch in batches for row in batch) == list(range(23))
    assert max(map(len, batches)) == 4


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_is_disjoint_and_complete(n: int, share: float, seed: int) -> None:
    encoded = Encoded(
        ids=np.arange(n, dtype=np.int32),
        offsets=np.arange(n + 1),
        trained=np.ones(n, np.uint8),
        cut=np.zeros(n, bool),
        groups=np.arange(n),
        pad_id=0,
    )
    train, heldout = split(encoded, share, seed)
    assert sorted([*train.ids, *heldout.ids]) == list(range(n))
    assert len(heldout) == min(max(1, round(n * share)), n - 1)
    again = split(encoded, share, seed)[1]
    np.testing.assert_array_equal(heldout.ids, again.ids)


def test_a_split_keeps_the_rows_of_one_dialogue_together() -> None:
    tokenizer = makers.bpe_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if loop.last %}!{% endif %}<|im_end|>{% endfor %}"
    )
    dialogues = [
        Example(messages=(("user", f"q{i}"), ("assistant", "a"), ("user", "r"), ("assistant", f"b{i}")))
        for i in range(8)
    ]
    encoded = encode(dialogues, tokenizer, 64)
    assert len(encoded) == 16
    train, heldout = split(encoded, 0.25, 0)
    assert len(heldout) == 4
    assert not set(train.groups) & set(heldout.groups)


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(BadInput, match="2 or more"):
        split(encoded_rows(1), 0.5, 0)


def test_a_share_is_held_out_of_the_data_and_a_file_is_read(tmp_path: Any) -> None:
    rows = [{"prompt": "the ", "completion": f"sky {i}"} for i in range(20)]
    tokenizer = makers.byte_tokenizer()
    shared = prepare(rows, tokenizer, seq_len=32, eval_data=0.25, seed=1)
    assert (len(shared.train), len(shared.heldout or [])) == (15, 5)
    assert shared.provenance["eval"]["rows"] == 5
    assert shared.report.rows == 15
    path = tmp_path / "held.txt"
    path.write_text("the sky is blue")
    apart = prepare(rows, tokenizer, seq_len=32, eval_data=path)
    assert len(apart.train) == 20
    assert apart.provenance["eval"]["format"] == "text"
    with pytest.raises(BadInput, match="held-out"):
        prepare(rows, tokenizer, seq_len=32, eval_data=[{"prompt": "a", "completion": ""}])
    assert prepare(rows, tokenizer, seq_len=32).heldout is None

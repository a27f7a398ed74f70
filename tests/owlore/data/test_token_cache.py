"""The cache of tokens gives back exactly what encoding gives, or encodes again."""

import dataclasses

import numpy as np
import pytest
from makers import bpe_tokenizer, byte_tokenizer

from owlore.data import cache
from owlore.data.cache import encode_cached
from owlore.data.examples import Example
from owlore.data.prepare import prepare
from owlore.data.tokenise import encode

ROWS = [Example(prompt="the " * (1 + i % 3), answer="sky " * (1 + i % 5)) for i in range(40)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cache, "MIN_ROWS", 10)


def same(a, b):
    names = [f.name for f in dataclasses.fields(a)]
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


def test_a_second_run_reads_what_the_first_one_encoded(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    first, told = encode_cached(ROWS, tokenizer, 16, tmp_path / "new")
    assert not told["cached"] and same(first, encode(ROWS, tokenizer, 16))
    monkeypatch.setattr(cache, "encode", lambda *_: pytest.fail("encoded again"))
    again, retold = encode_cached(ROWS, byte_tokenizer(), 16, tmp_path / "new")
    assert same(first, again) and retold == {"cached": True, "key": told["key"]}
    assert [p.name for p in (tmp_path / "new").iterdir()] == [told["key"] + ".safetensors"]


def other_template(text):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


OTHERS = {
    "rows": (ROWS[1:], byte_tokenizer, 16),
    "an answer": ([*ROWS[:-1], Example(prompt="the ", answer="sea")], byte_tokenizer, 16),
    "length": (ROWS, byte_tokenizer, 17),
    "tokenizer": (ROWS, bpe_tokenizer, 16),
    "vocabulary": (ROWS, lambda: byte_tokenizer(40), 16),
    "template": (ROWS, lambda: other_template("{{ messages[0].content }}"), 16),
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_that_changes_the_encoding_changes_the_key(tmp_path, name):
    _, told = encode_cached(ROWS, byte_tokenizer(), 16, tmp_path)
    rows, tokenizer, seq_len = OTHERS[name]
    _, other = encode_cached(rows, tokenizer(), seq_len, tmp_path)
    assert other["key"] not in (None, told["key"]) and not other["cached"]


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text"])
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    tokenizer = byte_tokenizer()
    first, told = encode_cached(ROWS, tokenizer, 16, tmp_path)
    path = tmp_path / (told["key"] + ".safetensors")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 4
    path.write_bytes({"empty": b"", "cut": whole[:-20], "flipped": bytes(flipped), "text": b"hello" * 99}[damage])
    again, retold = encode_cached(ROWS, tokenizer, 16, tmp_path)
    assert same(first, again) and not retold["cached"]
    assert encode_cached(ROWS, tokenizer, 16, tmp_path)[1]["cached"]


def test_what_cannot_be_kept_is_encoded_without(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for rows, tokenizer, directory in (
        (ROWS[:5], byte_tokenizer(), tmp_path),
        (ROWS, byte_tokenizer(), None),
        (ROWS, byte_tokenizer(), tmp_path / "file"),
        (ROWS, other_template("{{ strftime_now('%d') }}"), tmp_path),
    ):
        encoded, told = encode_cached(rows, tokenizer, 16, directory)
        assert same(encoded, encode(rows, tokenizer, 16)) and not told["cached"]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_old_entries_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MAX_ENTRIES", 3)
    keys = [encode_cached(ROWS, byte_tokenizer(), 10 + n, tmp_path)[1]["key"] for n in range(5)]
    assert sorted(p.stem for p in tmp_path.iterdir()) == sorted(keys[-3:])


def test_prepared_data_say_where_their_tokens_come_from(tmp_path):
    rows = [{"prompt": f"the {i} ", "completion": "sky"} for i in range(30)]
    prepared = [prepare(rows, byte_tokenizer(), seq_len=16, eval_data=0.2, cache=tmp_path) for _ in range(2)]
    assert [p.provenance["train"]["encoding"]["cached"] for p in prepared] == [False, True]
    assert same(prepared[0].train, prepared[1].train) and same(prepared[0].heldout, prepared[1].heldout)

"""Converting examples to token ids: flat int32 ids, row offsets, and a mask of the trained tokens.

Each piece of a row (prompt, answer) is tokenised separately. When the model is used, the prompt is tokenised before
there is an answer, so that no token crosses the boundary between them; neither does one here. The ids still decode to
the full text.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from htsr.errors import BadInput
from owlore.data.examples import Example
from owlore.data.templates import Row, rows_of

CHUNK = 2048  # rows per tokenizer call: enough to be fast, and few enough to need little memory for their texts
ANCHOR = "\n"


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids of all rows in one array; row i is `ids[offsets[i]:offsets[i + 1]]`.

    Attributes:
        ids: Token ids, [N] int32.
        offsets: Start of each row, and N, [rows + 1] int64.
        trained: 1 where the token is a target, [N] uint8.
        cut: Whether the row was longer than seq_len and was cut, [rows] bool.
        groups: Rows with the same number stay together when data are split, [rows] int64.
        pad_id: Token id of padding.
    """

    ids: np.ndarray
    offsets: np.ndarray
    trained: np.ndarray
    cut: np.ndarray
    groups: np.ndarray
    pad_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of one row, as views."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[span], self.trained[span]

    @property
    def truncated(self) -> int:
        """Number of rows that were cut."""
        return int(self.cut.sum())

    @property
    def trained_per_row(self) -> np.ndarray:
        """Number of targets of each row, [rows]; its first token is not a target, since nothing precedes it."""
        targets = self.trained.astype(np.int64)
        targets[self.offsets[:-1]] = 0
        return np.add.reduceat(targets, self.offsets[:-1])

    def take(self, rows: Sequence[int] | np.ndarray) -> Encoded:
        """A data set of these rows in this order."""
        parts = [self.row(int(i)) for i in rows]
        return Encoded(
            ids=np.concatenate([ids for ids, _ in parts]),
            offsets=np.cumsum([0, *(len(ids) for ids, _ in parts)], dtype=np.int64),
            trained=np.concatenate([trained for _, trained in parts]),
            cut=self.cut[np.asarray(rows)],
            groups=self.groups[np.asarray(rows)],
            pad_id=self.pad_id,
        )


@dataclass
class _Table:
    """The rows that `encode` has made so far."""

    ids: array = field(default_factory=lambda: array("i"))
    trained: array = field(default_factory=lambda: array("B"))
    lengths: list[int] = field(default_factory=list)
    cut: list[bool] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def add(self, ids: list[int], trained: bytes, *, cut: bool, group: int) -> None:
        if not ids:
            return
        self.ids.extend(ids)
        self.trained.frombytes(trained)
        self.lengths.append(len(ids))
        self.cut.append(cut)
        self.groups.append(group)


def encode(examples: Sequence[Example], tokenizer: Any, seq_len: int) -> Encoded:
    """Token ids and masks of all examples, in rows of at most `seq_len` tokens.

    An end-of-sequence token is appended to each answer and trained, unless a chat template has an end-of-turn token.
    Rows with a prompt are cut on the right; plain texts become consecutive windows, so that no token is lost. A row
    without tokens (an empty text) becomes one untrained end-of-sequence token, so that it is counted.

    Args:
        examples: The examples.
        tokenizer: The tokenizer.
        seq_len: Largest number of tokens of a row.

    Raises:
        BadInput: The tokenizer has no end-of-sequence token, or its chat template refuses a row.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise BadInput("the tokenizer has no end-of-sequence token, which ends each answer; set tokenizer.eos_token")
    leading = leading_tokens(tokenizer)
    anchor = _anchor_ids(tokenizer)
    table = _Table()
    group = 0
    for chunk in _chunks(((i, row) for i, e in enumerate(examples) for row in rows_of(e, tokenizer, i + 1)), CHUNK):
        rows = [row for _, row in chunk]
        tokens = iter(_tokens(rows, tokenizer, anchor))
        for number, row in chunk:
            ids, trained = _assemble(row, tokens, leading, eos)
            if row.windows:
                for start in range(0, len(ids), seq_len):
                    stop = start + seq_len
                    table.add(ids[start:stop], trained[start:stop], cut=False, group=group)
                    group += 1
            else:
                # Rows of one dialogue have the same number, negative so that it differs from those of windows.
                table.add(ids[:seq_len], trained[:seq_len], cut=len(ids) > seq_len, group=-1 - number)
    pad = tokenizer.pad_token_id
    return Encoded(
        ids=np.frombuffer(table.ids, dtype=np.int32) if table.ids else np.zeros(0, np.int32),
        offsets=np.cumsum([0, *table.lengths], dtype=np.int64),
        trained=np.frombuffer(table.trained, dtype=np.uint8) if table.trained else np.zeros(0, np.uint8),
        cut=np.array(table.cut, dtype=bool),
        groups=np.array(table.groups, dtype=np.int64),
        pad_id=pad if pad is not None else eos,
    )


def leading_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text (<s>, or none)."""
    plain = _ids(tokenizer, ["x"])[0]
    with_special = tokenizer("x", add_special_tokens=True)["input_ids"]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def _assemble(row: Row, tokens: Iterator[list[int]], leading: list[int], eos: int) -> tuple[list[int], bytes]:
    """Ids and mask of one row; the tokens of its pieces are taken from the iterator."""
    ids = list(leading) if row.special else []
    mask = bytearray(row.windows and row.pieces[0].trained for _ in ids)
    for piece in row.pieces:
        piece_ids = next(tokens)
        ids += piece_ids
        mask += bytes([piece.trained]) * len(piece_ids)
        if piece.ends:
            ids.append(eos)
            mask.append(piece.trained)
    if not ids:
        return [eos], b"\0"
    return ids, bytes(mask)


def _tokens(rows: list[Row], tokenizer: Any, anchor: list[int] | None) -> list[list[int]]:
    """Token ids of every piece of every row, in order, by one tokenizer call."""
    texts, follows = [], []
    for row in rows:
        for i, piece in enumerate(row.pieces):
            after_text = any(earlier.text for earlier in row.pieces[:i])
            follow = anchor is not None and bool(piece.text) and after_text
            texts.append(ANCHOR + piece.text if follow else piece.text)
            follows.append(follow)
    found = _ids(tokenizer, texts)
    if anchor is None:
        return found
    again = [i for i, follow in enumerate(follows) if follow and found[i][: len(anchor)] != anchor]
    for i, ids in zip(again, _ids(tokenizer, [texts[i][len(ANCHOR) :] for i in again]), strict=True):
        found[i], follows[i] = ids, False
    return [ids[len(anchor) :] if follow else ids for ids, follow in zip(found, follows, strict=True)]


def _anchor_ids(tokenizer: Any) -> list[int] | None:
    """Ids of a line break that is put before a piece that continues a text and is removed again, or None.

    SentencePiece tokenizers put a space before every text, so that an answer tokenised alone would not decode to the
    text that follows the prompt. Other tokenizers do not, and a line break might merge with the text after it.
    """
    first, second = _ids(tokenizer, ["a", "b"])
    joined = tokenizer.decode(first + second, clean_up_tokenization_spaces=False)
    apart = tokenizer.decode(first, clean_up_tokenization_spaces=False)
    return _ids(tokenizer, [ANCHOR])[0] if joined == apart + " b" else None


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _chunks(items: Iterator[tuple[int, Row]], size: int) -> Iterator[list[tuple[int, Row]]]:
    while chunk := list(islice(items, size)):
        yield chunk

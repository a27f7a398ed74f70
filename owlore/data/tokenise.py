"""Examples to token ids: flat int32 ids, row offsets, and a mask that says which tokens are trained.

Each piece of a row (what is read, what is answered) is tokenised on its own. The reason: when the model is used, the
prompt is tokenised before an answer exists, so a token that straddles the boundary could never be seen there. The
boundary is exact by construction, and the ids still decode to the whole text.
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
from owlore.data.templates import Piece, Row, rows_of

CHUNK = 2048  # rows per tokenizer call: large enough to be quick, small enough to keep little text twice
ANCHOR = "\n"


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids of all rows in one array; row i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: np.ndarray  # [N] int32
    offsets: np.ndarray  # [rows + 1] int64
    trained: np.ndarray  # [N] uint8: 1 where the token is a target
    cut: np.ndarray  # [rows] bool: longer than seq_len, the end is gone
    groups: np.ndarray  # [rows] int64: rows with the same number belong together when data are split
    pad_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of one row (views)."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[span], self.trained[span]

    @property
    def truncated(self) -> int:
        """Rows that were longer than seq_len and lost their end."""
        return int(self.cut.sum())

    @property
    def trained_per_row(self) -> np.ndarray:
        """Targets of each row [rows]; a row's first token is none, since nothing precedes it."""
        targets = self.trained.astype(np.int64)
        targets[self.offsets[:-1]] = 0
        return np.add.reduceat(targets, self.offsets[:-1])

    def take(self, rows: Sequence[int] | np.ndarray) -> Encoded:
        """The named rows, in that order, as a data set of their own."""
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
    """What `encode` fills, row after row."""

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
    """Token ids and masks of all examples, none of them longer than `seq_len`.

    An end-of-sequence token is appended to each answer and trained (a chat template's own end-of-turn token counts as
    one). Rows with a prompt are cut on the right; plain texts become consecutive windows, so nothing of them is lost.
    A row that gives no token at all (an empty text) is one end-of-sequence token, untrained, so that it still counts.

    Raises: BadInput when the tokenizer has no end-of-sequence token or its chat template refuses a row.
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
                # rows of one dialogue share its number, which is negative so that it meets no window's
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
    """What the tokenizer puts before any text by itself (<s>, or nothing)."""
    plain = _ids(tokenizer, ["x"])[0]
    whole = tokenizer("x", add_special_tokens=True)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _assemble(row: Row, tokens: Iterator[list[int]], leading: list[int], eos: int) -> tuple[list[int], bytes]:
    """Ids and mask of one row from the tokens of its pieces, taken from the iterator."""
    ids = list(leading) if row.special else []
    mask = bytearray(row.windows and row.pieces[0].trained for _ in ids)
    for piece in row.pieces:
        got = next(tokens)
        ids += got
        mask += bytes([piece.trained]) * len(got)
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
            follow = anchor is not None and i > 0 and bool(piece.text) and _any_text(row.pieces[:i])
            texts.append(ANCHOR + piece.text if follow else piece.text)
            follows.append(follow)
    found = _ids(tokenizer, texts)
    if anchor is None:
        return found
    again = [i for i, follow in enumerate(follows) if follow and found[i][: len(anchor)] != anchor]
    for i, ids in zip(again, _ids(tokenizer, [texts[i][len(ANCHOR) :] for i in again]), strict=True):
        found[i], follows[i] = ids, False
    return [ids[len(anchor) :] if follow else ids for ids, follow in zip(found, follows, strict=True)]


def _any_text(pieces: Sequence[Piece]) -> bool:
    return any(piece.text for piece in pieces)


def _anchor_ids(tokenizer: Any) -> list[int] | None:
    """Ids of a line break to put before a piece that continues a text and to take away again, or None.

    Sentencepiece-like tokenizers write a space before any text they are given, so an answer on its own would not
    decode to what follows the prompt. Others need no such help, and a line break might merge with what follows.
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

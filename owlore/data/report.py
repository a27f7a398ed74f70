"""A report on the data before the first step: counts, and a row with its trained parts marked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from htsr.errors import BadInput
from owlore.data.tokenise import Encoded

SAMPLE_CHARACTERS = 1200
WARNED_FROM = 0.05  # share of rows that train nothing


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts of an encoded data set.

    Attributes:
        rows: Number of rows.
        tokens: Number of tokens.
        trained_tokens: Number of trained tokens.
        trained_share: Share of trained tokens, in [0, 1].
        truncated: Rows that were longer than seq_len and were cut.
        empty: Rows without a trained token.
        longest: Tokens of the longest row.
        sample: Text of the first row with a trained token; trained parts are between « and ».
    """

    rows: int
    tokens: int
    trained_tokens: int
    trained_share: float
    truncated: int
    empty: int
    longest: int
    sample: str

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def shown(self) -> list[str]:
        """The report as lines for a terminal: the counts and, indented, the sample."""
        useless = self.empty / self.rows
        warned = [
            f"note: {self.empty:,} of {self.rows:,} rows ({useless:.0%}) train nothing: their answer is empty or "
            "beyond --seq-len"
        ]
        head = [*(warned if useless >= WARNED_FROM else []), "a row; what is trained stands between « and »:"]
        return [f"data: {self}", *head, *(f"  | {line}" for line in self.sample.split("\n"))]

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.trained_share:.1%} of them trained; "
            f"{self.truncated:,} rows cut, {self.empty:,} without a trained token; longest {self.longest:,} tokens"
        )


def data_report(encoded: Encoded, tokenizer: Any, source: str = "data") -> DataReport:
    """Count rows and tokens, and decode the first row with a trained token.

    Args:
        encoded: The rows.
        tokenizer: The tokenizer that encoded them.
        source: Name of the data in error messages.

    Raises:
        BadInput: No row has a trained token: every answer is empty, or seq_len cuts all of them off.
    """
    if not len(encoded):
        raise BadInput(f"{source}: holds no rows; expected at least one")
    per_row = encoded.trained_per_row
    trained = int(per_row.sum())
    if trained == 0:
        cause = (
            f"{encoded.truncated} of them are cut before their answer begins: raise --seq-len"
            if encoded.truncated
            else "every answer is empty"
        )
        raise BadInput(f"{source}: none of the {len(encoded)} rows has a trained token; {cause}")
    return DataReport(
        rows=len(encoded),
        tokens=len(encoded.ids),
        trained_tokens=trained,
        trained_share=trained / len(encoded.ids),
        truncated=encoded.truncated,
        empty=int((per_row == 0).sum()),
        longest=int(np.diff(encoded.offsets).max()),
        sample=masked_text(encoded, int(np.argmax(per_row > 0)), tokenizer),
    )


def masked_text(encoded: Encoded, row: int, tokenizer: Any) -> str:
    """One row as text with its special tokens, the trained parts between « and »."""
    ids, trained = encoded.row(row)
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    parts, before = [], ""
    for start, stop in pairwise(edges):
        # A part is the difference to the text before it: decoded alone it might lose the space that it begins with.
        so_far = tokenizer.decode(ids[:stop].tolist(), skip_special_tokens=False)
        text, before = printable(so_far[len(before) :]), so_far
        if len(text) > SAMPLE_CHARACTERS:
            text = f"{text[: SAMPLE_CHARACTERS // 2]} ... {text[-SAMPLE_CHARACTERS // 2 :]}"
        parts.append(f"«{text}»" if trained[start] else text)
    return "".join(parts)


def printable(text: str) -> str:
    """The text without control characters, which a terminal would execute."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")

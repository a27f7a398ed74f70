"""Preparing the data of a run: training rows, held-out rows, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from htsr.errors import BadInput
from owlore.data.batches import SPLIT_PURPOSE, permutation
from owlore.data.cache import encode_cached
from owlore.data.formats import load_rows
from owlore.data.report import DataReport, data_report
from owlore.data.tokenise import Encoded


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The encoded data of a run.

    Attributes:
        train: The training rows.
        heldout: The held-out rows, or None.
        report: Counts of the training rows.
        seq_len: Largest number of tokens of a row.
        provenance: Where the data come from: `train`, and `eval` with held-out rows.
    """

    train: Encoded
    heldout: Encoded | None
    report: DataReport
    seq_len: int
    provenance: dict[str, dict[str, Any]]


def prepare(
    data: Any,
    tokenizer: Any,
    *,
    seq_len: int,
    eval_data: str | Path | float | Any | None = None,
    seed: int = 0,
    cache: Path | None = None,
) -> Prepared:
    """Load, tokenise, hold out and report.

    Args:
        data: The data, as `load_rows` takes them.
        tokenizer: The tokenizer.
        seq_len: Largest number of tokens of a row.
        eval_data: A share in (0, 1) of `data` to hold out, or other data as for `data`; None holds out nothing.
        seed: Seed of the rows that are held out.
        cache: Directory in which the tokens of large data are kept for the next run; None keeps nothing.

    Raises:
        NotFound: As `load_rows`.
        BadInput: As `load_rows`, `encode` and `data_report`.
    """
    rows = load_rows(data)
    train, encoding = encode_cached(rows.examples, tokenizer, seq_len, cache)
    provenance = {"train": {**rows.provenance, "encoding": encoding}}
    heldout = None
    if isinstance(eval_data, float):
        data_report(train, tokenizer, rows.provenance["source"])  # checks the data before the split
        train, heldout = split(train, eval_data, seed)
        provenance["eval"] = {**rows.provenance, "share": eval_data, "seed": seed, "rows": len(heldout)}
    elif eval_data is not None:
        other = load_rows(eval_data)
        heldout, encoding = encode_cached(other.examples, tokenizer, seq_len, cache)
        provenance["eval"] = {**other.provenance, "encoding": encoding}
    report = data_report(train, tokenizer, rows.provenance["source"])
    if heldout is not None:
        data_report(heldout, tokenizer, f"held-out part of {provenance['eval']['source']}")
    return Prepared(train=train, heldout=heldout, report=report, seq_len=seq_len, provenance=provenance)


def split(encoded: Encoded, share: float, seed: int) -> tuple[Encoded, Encoded]:
    """Divide the rows into training and held-out rows; rows of one group stay together.

    Args:
        encoded: The rows.
        share: Share of the groups to hold out, in (0, 1); at least one is held out and at least one is not.
        seed: Seed of the groups that are held out.

    Returns:
        The training rows and the held-out rows.

    Raises:
        BadInput: There are fewer than two groups.
    """
    _, group = np.unique(encoded.groups, return_inverse=True)
    n = int(group.max(initial=-1)) + 1
    if n < 2:
        raise BadInput(
            f"data: got {n} row to divide into training and evaluation; expected 2 or more, or a file of its own"
        )
    held = min(max(1, round(n * share)), n - 1)
    chosen = np.zeros(n, dtype=bool)
    chosen[permutation(seed, SPLIT_PURPOSE, 0, n)[:held]] = True
    return encoded.take(np.flatnonzero(~chosen[group])), encoded.take(np.flatnonzero(chosen[group]))

"""From what the user named to what the loop reads: training rows, held-out rows, and where they came from."""

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
    """Encoded data of a run. `provenance` has `train` and, with held-out data, `eval`."""

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

    `eval_data`: a share in (0, 1) to hold out of `data`, drawn by the seed, or data of its own as for `data`.
    `cache`: directory in which the tokens of large data are kept for the next run.

    Raises: BadInput, NotFound as `load_rows`, `encode` and `data_report`.
    """
    rows = load_rows(data)
    train, encoding = encode_cached(rows.examples, tokenizer, seq_len, cache)
    provenance = {"train": {**rows.provenance, "encoding": encoding}}
    heldout = None
    if isinstance(eval_data, float):
        data_report(train, tokenizer, rows.provenance["source"])  # says what is wrong before the split hides it
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
    """(train, held out): disjoint, together everything, drawn by the seed; rows that belong together stay so.

    Raises: BadInput when there are fewer than two rows to divide.
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

"""Which rows a step sees, as a pure function of (seed, step), and how they become tensors.

There is no data loader and no state: a resume, another process or a notebook asks for step t and gets its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from owlore.data.tokenise import Encoded
from owlore.kernels.cross_entropy import IGNORED

# Purposes keep the streams of one seed apart; the numbers are part of what makes a run reproducible.
ORDER_PURPOSE = 0x6F72646572
SPLIT_PURPOSE = 0x73706C6974


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Tensors of one forward pass, right-padded; `labels[b, t]` is the token at t (the loss shifts) or -100."""

    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64
    num_trained: int  # labels[:, 1:] != -100, the tokens that the shifted loss counts
    position_ids: Tensor | None = None  # [B, T] int64 where rows are packed: from 0 again at the beginning of each

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors by name, on a device."""
        tensors = {"input_ids": self.input_ids, "labels": self.labels, "position_ids": self.position_ids}
        return {name: t.to(device, non_blocking=True) for name, t in tensors.items() if t is not None}


def permutation(seed: int, purpose: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of n from the counter-based generator keyed by (seed, purpose, epoch).

    Raw 64-bit draws are sorted instead of calling `Generator.permutation`, whose stream numpy may change.
    """
    key = np.random.SeedSequence((seed, purpose, epoch)).generate_state(2, np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which epoch `epoch` (from 0) visits the n rows; read-only."""
    rows = permutation(seed, ORDER_PURPOSE, epoch, n)
    rows.setflags(write=False)
    return rows


def num_steps(n: int, *, epochs: float, batch: int, accum: int) -> int:
    """Optimizer steps that show ceil(n * epochs) rows; the last step may be smaller."""
    return -(-total_rows(n, epochs) // (batch * accum))


def total_rows(n: int, epochs: float) -> int:
    """Rows shown in `epochs` passes over n rows, at least one."""
    return max(1, int(np.ceil(n * epochs - 1e-9)))


def step_rows(
    step: int,
    *,
    batch: int,
    accum: int,
    n: int,
    seed: int,
    total_rows: int | None = None,
    visits: Callable[[int], np.ndarray] | None = None,
) -> list[list[int]]:
    """Row indexes of the micro-batches of step `step`, counted from 1 as in metrics.jsonl.

    Epochs follow each other without a gap, so a step may hold the end of one and the beginning of the next. With
    `total_rows` (see `total_rows()`) what lies beyond it is left out: the last step holds fewer rows, perhaps fewer
    micro-batches. The rows of (batch, accum) and of (batch * accum, 1) are the same rows. `visits(epoch)` is the order
    of an epoch where it is another than `order(seed, epoch, n)`.
    """
    if step < 1:
        raise ValueError(f"step {step}: steps are counted from 1")
    first = (step - 1) * batch * accum
    last = first + batch * accum
    if total_rows is not None:
        last = min(last, total_rows)
    visits = visits or (lambda epoch: order(seed, epoch, n))
    rows = [int(visits(position // n)[position % n]) for position in range(first, last)]
    return [rows[i : i + batch] for i in range(0, len(rows), batch)]


def epoch_at(step: int, *, batch: int, accum: int, n: int, total_rows: int | None = None) -> float:
    """Passes over the data when step `step` is done (a share of an epoch counts as such)."""
    shown = step * batch * accum
    return (shown if total_rows is None else min(shown, total_rows)) / n


def collate(encoded: Encoded, rows: list[int]) -> MicroBatch:
    """The rows as tensors, padded on the right to the longest of them.

    A causal model never lets a token see what is on its right, so right padding needs no attention mask: padded
    positions change no trained position and carry no label.
    """
    lengths = [int(encoded.offsets[row + 1] - encoded.offsets[row]) for row in rows]
    width = max(lengths)
    ids = np.full((len(rows), width), encoded.pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        tokens, trained = encoded.row(row)
        ids[i, :length] = tokens
        labels[i, :length] = np.where(trained, tokens, IGNORED)
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        num_trained=int((labels[:, 1:] != IGNORED).sum()),
    )


def length_batches(encoded: Encoded, batch: int) -> list[list[int]]:
    """All rows once in batches of similar length, for evaluation where the order does not matter."""
    by_length = np.argsort(np.diff(encoded.offsets), kind="stable")
    return [by_length[i : i + batch].tolist() for i in range(0, len(by_length), batch)]

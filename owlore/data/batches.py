"""The rows of a step, as a pure function of (seed, step), and their tensors.

There is no data loader and no state: a resumed run, another process or a notebook computes the rows of step t.
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

# The purposes make the streams of one seed independent. A run is only reproducible with the same numbers.
ORDER_PURPOSE = 0x6F72646572
SPLIT_PURPOSE = 0x73706C6974


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Tensors of one forward pass, padded on the right.

    Attributes:
        input_ids: Token ids, [B, T] int64.
        labels: [B, T] int64: the token at the same position (the loss shifts), or -100 if it is not trained.
        num_trained: Number of labels[:, 1:] other than -100, which are those that the shifted loss counts.
        position_ids: [B, T] int64 for packed rows: positions that restart at 0 with each row; else None.
    """

    input_ids: Tensor
    labels: Tensor
    num_trained: int
    position_ids: Tensor | None = None

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors as arguments of a model, on a device."""
        tensors = {"input_ids": self.input_ids, "labels": self.labels, "position_ids": self.position_ids}
        return {name: t.to(device, non_blocking=True) for name, t in tensors.items() if t is not None}


def permutation(seed: int, purpose: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of range(n) from the counter-based generator with the key (seed, purpose, epoch).

    Note: raw 64-bit draws are sorted instead of calling `Generator.permutation`, whose stream numpy may change.
    """
    key = np.random.SeedSequence((seed, purpose, epoch)).generate_state(2, np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The n rows in the order of epoch `epoch`, counted from 0; read-only."""
    rows = permutation(seed, ORDER_PURPOSE, epoch, n)
    rows.setflags(write=False)
    return rows


def num_steps(n: int, *, epochs: float, batch: int, accum: int) -> int:
    """Optimizer steps for ceil(n * epochs) rows; the last step may be smaller."""
    return -(-total_rows(n, epochs) // (batch * accum))


def total_rows(n: int, epochs: float) -> int:
    """Number of rows in `epochs` passes over n rows, at least one."""
    return max(1, int(np.ceil(n * epochs - 1e-9)))


def step_rows(
    step: int,
    *,
    batch: int,
    accum: int,
    n: int,
    seed: int,
    total_rows: int | None = None,
    order_of: Callable[[int], np.ndarray] | None = None,
) -> list[list[int]]:
    """Row indexes of the micro-batches of a step.

    Epochs follow each other without a gap, so that a step may have the end of one and the beginning of the next. The
    rows of (batch, accum) are those of (batch * accum, 1).

    Args:
        step: Number of the step, counted from 1 as in metrics.jsonl.
        batch: Rows of a micro-batch.
        accum: Micro-batches of a step.
        n: Number of rows of the data.
        seed: Seed of the order.
        total_rows: Number of rows of the run (see `total_rows()`); the last step may have fewer rows, and fewer
            micro-batches. None is a run without an end.
        order_of: Gives the order of an epoch; None takes `order(seed, epoch, n)`.

    Raises:
        ValueError: The step is below 1.
    """
    if step < 1:
        raise ValueError(f"step {step}: steps are counted from 1")
    first = (step - 1) * batch * accum
    last = first + batch * accum
    if total_rows is not None:
        last = min(last, total_rows)
    order_of = order_of or (lambda epoch: order(seed, epoch, n))
    rows = [int(order_of(position // n)[position % n]) for position in range(first, last)]
    return [rows[i : i + batch] for i in range(0, len(rows), batch)]


def epoch_at(step: int, *, batch: int, accum: int, n: int, total_rows: int | None = None) -> float:
    """Passes over the data after step `step`, as a fraction."""
    shown = step * batch * accum
    return (shown if total_rows is None else min(shown, total_rows)) / n


def collate(encoded: Encoded, rows: list[int]) -> MicroBatch:
    """The rows as tensors, padded on the right to the longest of them.

    Right padding needs no attention mask in a causal model: padded positions change no trained position and have no
    label.
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
    """All rows once in batches of similar length, for an evaluation, where the order does not matter."""
    by_length = np.argsort(np.diff(encoded.offsets), kind="stable")
    return [by_length[i : i + batch].tolist() for i in range(0, len(by_length), batch)]

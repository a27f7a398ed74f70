"""Several rows in one sequence without attention between them: first-fit packing, and tensors of packed sequences.

Positions restart at 0 with each row. Without an attention mask, transformers masks attention between tokens whose
positions are not consecutive, and the first token of a row is not a target, so that a packed row has the loss that it
has alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from owlore.data.arrange import Arrangement, Sequences
from owlore.data.batches import MicroBatch, order
from owlore.data.tokenise import Encoded
from owlore.kernels.cross_entropy import IGNORED

OPEN_SEQUENCES = 256  # a row is put into one of the last 256 sequences, so that rows of a sequence were drawn close


def first_fit(lengths: np.ndarray, rows: np.ndarray, capacity: int) -> Sequences:
    """Put each row into the first open sequence with enough space; the oldest is closed when there are too many.

    Args:
        lengths: Number of tokens of each row, at most `capacity`.
        rows: The rows in the order in which they are packed.
        capacity: Largest number of tokens of a sequence.
    """
    packed: list[list[int]] = []
    free = np.zeros(0, dtype=np.int64)  # free tokens of the open sequences, which are the last of `packed`
    for row in rows:
        fits = free >= lengths[row]
        at = int(fits.argmax()) if fits.any() else len(free)
        if at == len(free):
            packed.append([])
            free = np.append(free, capacity)[-OPEN_SEQUENCES:]
            at = len(free) - 1
        packed[len(packed) - len(free) + at].append(int(row))
        free[at] -= lengths[row]
    return [tuple(sequence) for sequence in packed]


class Packed(Arrangement):
    """An `Arrangement` with several rows per sequence; every epoch packs each row once, in a new order.

    Steps have `batch * accum` sequences, and an epoch has as many sequences as its packing gives.

    Args:
        lengths: Number of tokens of each row, at most `capacity`.
        seed: Seed of the order.
        batch: Sequences of a micro-batch.
        accum: Micro-batches of a step.
        epochs: Passes over the data after which the run ends; None if it ends at a given step.
        capacity: Largest number of tokens of a sequence.
    """

    def __init__(
        self, lengths: np.ndarray, *, seed: int, batch: int, accum: int, epochs: float | None, capacity: int
    ) -> None:
        super().__init__(lengths, seed=seed, batch=batch, accum=accum, epochs=epochs)
        self.capacity = capacity
        self._packed: list[Sequences] = []
        self.total = None if epochs is None else self._sequences_in(epochs)

    @property
    def steps(self) -> int | None:
        return None if self.total is None else -(-self.total // (self.batch * self.accum))

    def step(self, step: int) -> list[Sequences]:
        size = self.batch * self.accum
        found = []
        for position in range((step - 1) * size, self._last(step)):
            epoch, index = self._locate(position)
            found.append(self._pack(epoch)[index])
        return [found[i : i + self.batch] for i in range(0, len(found), self.batch)]

    def epoch(self, step: int) -> float:
        epoch, index = self._locate(self._last(step) - 1)
        return epoch + sum(map(len, self._pack(epoch)[: index + 1])) / self.rows

    def _last(self, step: int) -> int:
        """Number of sequences up to and with step `step`."""
        last = step * self.batch * self.accum
        return last if self.total is None else min(last, self.total)

    def _locate(self, position: int) -> tuple[int, int]:
        """The epoch of a sequence of the run, and its index in that epoch's packing."""
        epoch = 0
        while position >= len(self._pack(epoch)):
            position -= len(self._pack(epoch))
            epoch += 1
        return epoch, position

    def _pack(self, epoch: int) -> Sequences:
        while len(self._packed) <= epoch:
            rows = order(self.seed, len(self._packed), self.rows)
            self._packed.append(first_fit(self.lengths, rows, self.capacity))
        return self._packed[epoch]

    def _sequences_in(self, epochs: float) -> int:
        """Number of sequences in these passes; for a part of a pass, as many as have that share of the rows."""
        full = int(epochs + 1e-9)
        count = sum(len(self._pack(epoch)) for epoch in range(full))
        rest = (epochs - full) * self.rows - 1e-9
        if rest > 0:
            packed = accumulate(map(len, self._pack(full)))
            count += 1 + next(i for i, rows in enumerate(packed) if rows >= rest)
        return count


def collate_packed(encoded: Encoded, sequences: Sequence[Sequence[int]]) -> MicroBatch:
    """The sequences as tensors with positions, padded on the right to the longest of them.

    The first token of a row has no label: the shifted loss would predict it from the end of the row before.
    """
    lengths = [sum(len(encoded.row(row)[0]) for row in rows) for rows in sequences]
    shape = (len(sequences), max(lengths))
    ids = np.full(shape, encoded.pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    positions = np.tile(np.arange(shape[1], dtype=np.int64), (shape[0], 1))
    for i, rows in enumerate(sequences):
        start = 0
        for row in rows:
            tokens, trained = encoded.row(row)
            stop = start + len(tokens)
            ids[i, start:stop] = tokens
            labels[i, start:stop] = np.where(trained, tokens, IGNORED)
            labels[i, start] = IGNORED
            positions[i, start:] = np.arange(shape[1] - start)  # positions of padding continue those of the last row
            start = stop
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        num_trained=int((labels[:, 1:] != IGNORED).sum()),
        position_ids=torch.from_numpy(positions),
    )

"""Several rows in one sequence, without one seeing another: first-fit packing, and the tensors of packed sequences.

Positions restart at 0 with each row. transformers' masks (no attention mask given) keep tokens apart where positions
do not follow each other, and the first token of a row is no target, so a packed row has the loss it has alone.
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

OPEN_SEQUENCES = 256  # a row goes into one of the last so many: what is packed together was drawn close together


def first_fit(lengths: np.ndarray, rows: np.ndarray, capacity: int) -> Sequences:
    """The rows, in this order, each in the first open sequence that has room; none is longer than `capacity` tokens.

    lengths: tokens of each row, at most `capacity`. The oldest open sequence is closed when there are too many.
    """
    packed: list[list[int]] = []
    free = np.zeros(0, dtype=np.int64)  # room in the open sequences, which are the last of `packed`
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
    """Sequences of several rows, each at most `capacity` tokens; the rows of each epoch are packed anew.

    An epoch has as many sequences as its packing gives, so steps of `batch * accum` sequences and epochs are counted
    in them. Each epoch holds every row once.
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
        found = [self._at(position) for position in range((step - 1) * size, self._last(step))]
        return [found[i : i + self.batch] for i in range(0, len(found), self.batch)]

    def epoch(self, step: int) -> float:
        last, epoch = self._last(step), 0
        while last > len(self._pack(epoch)):
            last -= len(self._pack(epoch))
            epoch += 1
        return epoch + sum(map(len, self._pack(epoch)[:last])) / self.rows

    def _last(self, step: int) -> int:
        """Sequences shown when step `step` is done."""
        last = step * self.batch * self.accum
        return last if self.total is None else min(last, self.total)

    def _at(self, position: int) -> tuple[int, ...]:
        epoch = 0
        while position >= len(self._pack(epoch)):
            position -= len(self._pack(epoch))
            epoch += 1
        return self._pack(epoch)[position]

    def _pack(self, epoch: int) -> Sequences:
        while len(self._packed) <= epoch:
            rows = order(self.seed, len(self._packed), self.rows)
            self._packed.append(first_fit(self.lengths, rows, self.capacity))
        return self._packed[epoch]

    def _sequences_in(self, epochs: float) -> int:
        """Sequences of so many passes; of a part of a pass, as many as hold that share of the rows."""
        whole = int(epochs + 1e-9)
        count = sum(len(self._pack(epoch)) for epoch in range(whole))
        rest = (epochs - whole) * self.rows - 1e-9
        if rest > 0:
            shown = accumulate(map(len, self._pack(whole)))
            count += 1 + next(i for i, rows in enumerate(shown) if rows >= rest)
        return count


def collate_packed(encoded: Encoded, sequences: Sequence[Sequence[int]]) -> MicroBatch:
    """The sequences as tensors with positions, padded on the right to the longest of them.

    The first token of a row carries no label: the shifted loss would ask the end of the row before for it.
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
            positions[i, start:] = np.arange(shape[1] - start)  # padding goes on counting from the last row
            start = stop
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        num_trained=int((labels[:, 1:] != IGNORED).sum()),
        position_ids=torch.from_numpy(positions),
    )

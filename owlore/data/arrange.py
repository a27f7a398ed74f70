"""Which rows make the sequences of a step: shuffled, or grouped by length; `packing` puts several into a sequence.

A sequence is a tuple of row indexes. Nothing here has a state that a checkpoint would have to hold: what step t sees
is a pure function of the seed, the lengths of the rows and t.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from owlore.data.batches import epoch_at, num_steps, order, permutation, step_rows, total_rows

Sequences = list[tuple[int, ...]]

WINDOW_STEPS = 64  # steps whose rows are sorted together: long enough to save padding, short enough to stay shuffled
GROUP_PURPOSE = 0x67726F7570


class Arrangement:
    """Rows in the shuffled order of `batches.step_rows`, one row a sequence.

    lengths: tokens of each row. epochs: passes after which the run ends; None where it ends at a given step.
    """

    def __init__(self, lengths: np.ndarray, *, seed: int, batch: int, accum: int, epochs: float | None) -> None:
        self.lengths, self.seed, self.batch, self.accum = lengths, seed, batch, accum
        self.rows = len(lengths)
        self.epochs = epochs
        self.total = None if epochs is None else total_rows(self.rows, epochs)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of all epochs, or None where there is no end."""
        if self.epochs is None:
            return None
        return num_steps(self.rows, epochs=self.epochs, batch=self.batch, accum=self.accum)

    def step(self, step: int) -> list[Sequences]:
        """Sequences of the micro-batches of step `step`, counted from 1."""
        rows = step_rows(
            step, batch=self.batch, accum=self.accum, n=self.rows, seed=self.seed, total_rows=self.total,
            visits=self._visits,
        )  # fmt: skip
        return [[(row,) for row in micro] for micro in rows]

    def epoch(self, step: int) -> float:
        """Passes over the data when step `step` is done."""
        return epoch_at(step, batch=self.batch, accum=self.accum, n=self.rows, total_rows=self.total)

    def _visits(self, epoch: int) -> np.ndarray:
        return order(self.seed, epoch, self.rows)


class Grouped(Arrangement):
    """The same, with rows of similar length in a batch.

    Within windows of 64 steps the rows are sorted by length and cut into steps, whose order is then shuffled. The
    rows at the seams, in steps that two epochs share, stay as they were drawn. Each epoch shows every row once, and
    (batch, accum) shows the rows of (batch * accum, 1).
    """

    def __init__(self, lengths: np.ndarray, *, seed: int, batch: int, accum: int, epochs: float | None) -> None:
        super().__init__(lengths, seed=seed, batch=batch, accum=accum, epochs=epochs)
        self._grouped = lru_cache(maxsize=2)(self._group)

    def _visits(self, epoch: int) -> np.ndarray:
        return self._grouped(epoch)

    def _group(self, epoch: int) -> np.ndarray:
        size = self.batch * self.accum
        rows = order(self.seed, epoch, self.rows).copy()
        first = -epoch * self.rows % size  # so many rows complete the last step of the epoch before
        steps = max(0, (self.rows - first) // size)
        shuffled = permutation(self.seed, GROUP_PURPOSE, epoch, steps)
        for start in range(0, steps, WINDOW_STEPS):
            count = min(WINDOW_STEPS, steps - start)
            part = slice(first + start * size, first + (start + count) * size)
            by_length = rows[part][np.argsort(self.lengths[rows[part]], kind="stable")].reshape(count, size)
            rows[part] = by_length[np.argsort(shuffled[start : start + count])].reshape(-1)
        return rows

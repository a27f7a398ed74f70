"""The rows of each step: shuffled, or grouped by length; `packing` puts several rows into a sequence.

A sequence is a tuple of row indexes. There is no state that a checkpoint would have to hold: the sequences of step t
are a pure function of the seed, the lengths of the rows and t.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from owlore.data.batches import epoch_at, num_steps, order, permutation, step_rows, total_rows

Sequences = list[tuple[int, ...]]

WINDOW_STEPS = 64  # steps whose rows are sorted together: enough to save padding, and few enough to stay shuffled
GROUP_PURPOSE = 0x67726F7570


class Arrangement:
    """Rows in the shuffled order of `batches.step_rows`, one row per sequence.

    Args:
        lengths: Number of tokens of each row.
        seed: Seed of the order.
        batch: Sequences of a micro-batch.
        accum: Micro-batches of a step.
        epochs: Passes over the data after which the run ends; None if it ends at a given step.
    """

    def __init__(self, lengths: np.ndarray, *, seed: int, batch: int, accum: int, epochs: float | None) -> None:
        self.lengths, self.seed, self.batch, self.accum = lengths, seed, batch, accum
        self.rows = len(lengths)
        self.epochs = epochs
        self.total = None if epochs is None else total_rows(self.rows, epochs)
        self._cached_order = lru_cache(maxsize=2)(self._order)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of all epochs; None without a number of epochs."""
        if self.epochs is None:
            return None
        return num_steps(self.rows, epochs=self.epochs, batch=self.batch, accum=self.accum)

    def step(self, step: int) -> list[Sequences]:
        """Sequences of the micro-batches of step `step`, counted from 1."""
        rows = step_rows(
            step, batch=self.batch, accum=self.accum, n=self.rows, seed=self.seed, total_rows=self.total,
            order_of=self._cached_order,
        )  # fmt: skip
        return [[(row,) for row in micro] for micro in rows]

    def epoch(self, step: int) -> float:
        """Passes over the data after step `step`."""
        return epoch_at(step, batch=self.batch, accum=self.accum, n=self.rows, total_rows=self.total)

    def _order(self, epoch: int) -> np.ndarray:
        """The rows in the order of an epoch."""
        return order(self.seed, epoch, self.rows)


class Grouped(Arrangement):
    """An `Arrangement` with rows of similar length in a step.

    Within windows of 64 steps the rows are sorted by length and cut into steps, whose order is then shuffled. A step
    that two epochs share keeps its rows. Each epoch has every row once, and (batch, accum) gives the rows of
    (batch * accum, 1).
    """

    def _order(self, epoch: int) -> np.ndarray:
        size = self.batch * self.accum
        rows = order(self.seed, epoch, self.rows).copy()
        first = -epoch * self.rows % size  # the rows that complete the last step of the epoch before
        steps = max(0, (self.rows - first) // size)
        shuffled = permutation(self.seed, GROUP_PURPOSE, epoch, steps)
        for start in range(0, steps, WINDOW_STEPS):
            count = min(WINDOW_STEPS, steps - start)
            part = slice(first + start * size, first + (start + count) * size)
            by_length = rows[part][np.argsort(self.lengths[rows[part]], kind="stable")].reshape(count, size)
            rows[part] = by_length[np.argsort(shuffled[start : start + count])].reshape(-1)
        return rows

"""The blocks that are trained in each period: pure functions of (seed, period, table).

There is no sampler state, so that a resumed run and every rank of a distributed run draw the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from htsr.probability import inclusion
from owlore.kernels.seeds import seed_for

__all__ = ["DRAWS", "draw", "draw_cyclic", "draw_sequential", "draw_shuffled", "inclusion"]

UNIT = 1 << 40  # an inclusion of 1 as an integer: sums of inclusions are exact, and errors of pi are below 1e-12

Blocks = tuple[int, ...]


def draw(pi: NDArray[np.float64], seed: int, period: int) -> Blocks:
    """A sorted sample of round(sum pi) blocks in which block l is included with probability exactly pi[l].

    Systematic sampling with unequal probabilities in a random order (Madow 1949): the pi are put end to end on a line,
    and the blocks at a uniform offset and at every unit after it are taken. As no pi exceeds 1, no block is taken
    twice. With the random order, nearly every pair of blocks can be drawn together.

    Args:
        pi: Inclusion probability of each block, (blocks,) fp64 in [0, 1], with an integer sum.
        seed: Seed of the run.
        period: Number of the period, counted from 0.

    Returns:
        Indexes of the drawn blocks, ascending.

    Raises:
        ValueError: An inclusion lies outside [0, 1], or their sum is not an integer of at least 1.
    """
    lengths = _integer_lengths(pi)
    generator = _generator(seed, "draw", period)
    order = generator.permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    points = int(generator.integers(UNIT)) + UNIT * np.arange(ends[-1] // UNIT, dtype=np.int64)
    taken = order[np.searchsorted(ends, points, side="right")]
    return tuple(sorted(int(block) for block in taken))


def draw_sequential(pi: NDArray[np.float64], seed: int, period: int) -> Blocks:
    """The draw of the published OwLore code: one block after another without replacement, p proportional to pi.

    Note: its inclusion probabilities are *not* pi (frequent blocks are drawn less often); it is there for replication.

    Args:
        pi: Relative frequency of each block, (blocks,) fp64, not negative, with an integer sum.
        seed: Seed of the run.
        period: Number of the period, counted from 0.

    Returns:
        Indexes of the drawn blocks, ascending.

    Raises:
        ValueError: The sum is not an integer of at least 1, or fewer blocks have a positive pi.
    """
    size = _whole_sum(pi)
    drawable = int(np.count_nonzero(pi))
    if drawable < size:
        raise ValueError(f"{size} blocks are to be drawn and only {drawable} have a positive inclusion")
    taken = _generator(seed, "sequential", period).choice(len(pi), size=size, replace=False, p=pi / pi.sum())
    return tuple(sorted(int(block) for block in taken))


def draw_cyclic(pi: NDArray[np.float64], seed: int, period: int) -> Blocks:
    """The next gamma blocks in ascending order, again from the first after the last (BAdam, Luo et al. 2024).

    Args:
        pi: Inclusion probabilities, (blocks,) fp64; only their sum gamma is used, an integer.
        seed: Not used.
        period: Number of the period, counted from 0.

    Returns:
        Indexes of the blocks, ascending.

    Raises:
        ValueError: The sum is not an integer of at least 1.
    """
    del seed
    size, blocks = _whole_sum(pi), len(pi)
    return tuple(sorted((period * size + i) % blocks for i in range(size)))


def draw_shuffled(pi: NDArray[np.float64], seed: int, period: int) -> Blocks:
    """The next gamma blocks of a random order of all blocks, with a new order for each cycle.

    If gamma does not divide the number of blocks, a period may span two cycles. A block that would then be taken twice
    is swapped with the next one of the new cycle.

    Args:
        pi: Inclusion probabilities, (blocks,) fp64; only their sum gamma is used, an integer.
        seed: Seed of the run.
        period: Number of the period, counted from 0.

    Returns:
        Indexes of the blocks, ascending.

    Raises:
        ValueError: The sum is not an integer of at least 1.
    """
    size, blocks = _whole_sum(pi), len(pi)
    cycle = 0
    queue: list[int] = []
    for _ in range(period + 1):
        taken: list[int] = []
        while len(taken) < size:
            fresh = [block for block in queue if block not in taken]
            if not fresh:
                queue += [int(b) for b in _generator(seed, "cycle", cycle).permutation(blocks)]
                cycle += 1
                continue
            taken.append(fresh[0])
            queue.remove(fresh[0])
    return tuple(sorted(taken))


DRAWS: dict[str, Callable[[NDArray[np.float64], int, int], Blocks]] = {
    "exact": draw,
    "sequential": draw_sequential,
    "cyclic": draw_cyclic,
    "shuffled": draw_shuffled,
}


def _generator(seed: int, purpose: str, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed_for(seed, purpose, index)))


def _whole_sum(pi: NDArray[np.float64]) -> int:
    total = float(np.sum(pi))
    size = round(total)
    if size < 1 or abs(total - size) > 1e-6:
        raise ValueError(f"inclusion probabilities must sum to a whole number of blocks, got {total!r}")
    return size


def _integer_lengths(pi: NDArray[np.float64]) -> NDArray[np.int64]:
    """pi as integers with 1 = UNIT and an exact sum; a rounding residue is added where pi is nearest 0.5."""
    pi = np.asarray(pi, dtype=np.float64)
    if pi.ndim != 1 or np.any(~np.isfinite(pi)) or np.any(pi < 0) or np.any(pi > 1 + 1e-9):
        raise ValueError(f"inclusion probabilities must lie in [0, 1], got {pi!r}")
    target = _whole_sum(pi) * UNIT
    lengths = np.minimum(np.round(pi * UNIT).astype(np.int64), UNIT)
    residue = target - int(lengths.sum())
    for block in np.argsort(np.abs(pi - 0.5), kind="stable"):
        if not residue:
            break
        step = int(np.clip(residue, -lengths[block], UNIT - lengths[block]))
        lengths[block] += step
        residue -= step
    return lengths

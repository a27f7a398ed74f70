"""Which blocks are trained in which period: pure functions of (seed, period, table).

There is no sampler state: a resumed run and every rank of a distributed one agree by construction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from htsr.probability import inclusion
from owlore.kernels.seeds import seed_for

__all__ = ["DRAWS", "draw", "draw_cyclic", "draw_sequential", "draw_shuffled", "inclusion"]

UNIT = 1 << 40  # one whole inclusion in integer units: sums of inclusions are exact, errors of pi are below 1e-12

Blocks = tuple[int, ...]


def draw(pi: NDArray[np.float64], seed: int, period: int) -> Blocks:
    """A sorted sample of round(sum pi) blocks in which block l is included with probability exactly pi[l].

    Systematic sampling with unequal probabilities in a random order (Madow 1949): lay the pi end to end, drop one
    uniform offset, take every unit step. As no pi exceeds 1 no block is taken twice. The random order gives nearly
    every pair of blocks a chance to be drawn together.

    pi: inclusion probabilities in [0, 1] whose sum is a whole number.
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

    Its inclusion probabilities are *not* pi (frequent blocks are drawn less often); kept for replication.
    """
    size = _whole_sum(pi)
    drawable = int(np.count_nonzero(pi))
    if drawable < size:
        raise ValueError(f"{size} blocks are to be drawn and only {drawable} have a positive inclusion")
    taken = _generator(seed, "sequential", period).choice(len(pi), size=size, replace=False, p=pi / pi.sum())
    return tuple(sorted(int(block) for block in taken))


def draw_cyclic(pi: NDArray[np.float64], seed: int, period: int) -> Blocks:
    """Blocks in ascending order, gamma at a time, over and over (BAdam, Luo et al. 2024); pi gives only gamma."""
    del seed
    size, blocks = _whole_sum(pi), len(pi)
    return tuple(sorted((period * size + i) % blocks for i in range(size)))


def draw_shuffled(pi: NDArray[np.float64], seed: int, period: int) -> Blocks:
    """Like cyclic, but each cycle goes through the blocks in a random order of its own.

    Every block is drawn once a cycle. When gamma does not divide the number of blocks a period spans two cycles; a
    block that would be taken twice in it is swapped with the next one of the new cycle.
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
    """pi in units of 1/UNIT, summing to a whole number of units; the rounding residue goes to uncapped blocks."""
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

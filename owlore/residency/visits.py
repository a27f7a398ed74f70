"""Which block is visited when, and which visits load: pure functions of the drawn set.

A step walks the stack down and up once, whatever the number of micro-batches: every block forward in order, then
backward from the top to the lowest block that a gradient has to reach. Blocks that are streamed share a few slots. The
loader looks `slots` different blocks ahead and gives up the slot whose block is needed last, so that the blocks at a
turn of the walk are found where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class Direction(Enum):
    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Visit:
    """A block held for one direction of a step."""

    block: int
    direction: Direction


def step_visits(num_blocks: int, lowest: int) -> tuple[Visit, ...]:
    """The visits of an optimizer step; backward reaches down to `lowest` (num_blocks: no block at all)."""
    forward = [Visit(block, Direction.FORWARD) for block in range(num_blocks)]
    backward = [Visit(block, Direction.BACKWARD) for block in reversed(range(lowest, num_blocks))]
    return (*forward, *backward)


def next_loads(held: Sequence[int | None], coming: Iterable[int]) -> list[tuple[int, int]]:
    """(slot, block) to load now. held: block in each slot; coming: streamed blocks from the current visit on.

    As many different blocks as there are slots are wanted; each that is missing takes the slot whose block is needed
    last. The same decision is made for the plan and in the run.
    """
    ahead = list(dict.fromkeys(coming))
    wanted, when = ahead[: len(held)], {block: position for position, block in enumerate(ahead)}
    loads, now = [], list(held)
    for block in wanted:
        if block in now:
            continue
        free = [slot for slot, owner in enumerate(now) if owner not in wanted]
        slot = max(free, key=lambda s: (when.get(now[s], len(ahead)) if now[s] is not None else len(ahead) + 1, -s))  # type: ignore[arg-type]
        now[slot] = block
        loads.append((slot, block))
    return loads


@dataclass(frozen=True, kw_only=True)
class Loads:
    """Loads of one step in the steady state, and of the step's two directions."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def loads_of_step(num_blocks: int, lowest: int, streamed: Collection[int], slots: int, warm: int = 2) -> Loads:
    """Counted by walking `warm` steps and then one more. A load belongs to the direction of the visit it is for."""
    visits = step_visits(num_blocks, lowest)
    walk = [visit for visit in visits if visit.block in set(streamed)]
    held: list[int | None] = [None] * slots
    counted = {Direction.FORWARD: 0, Direction.BACKWARD: 0}
    for step in range(warm + 1):
        for index in range(len(walk)):
            coming = [*walk[index:], *walk]
            for slot, block in next_loads(held, (visit.block for visit in coming)):
                held[slot] = block
                first = next(visit for visit in coming if visit.block == block)
                if step == warm:
                    counted[first.direction] += 1
    return Loads(forward=counted[Direction.FORWARD], backward=counted[Direction.BACKWARD])

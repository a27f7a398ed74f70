"""The order in which a step visits blocks, and what is loaded for each visit: pure functions of the active set.

A step goes through the blocks twice, whatever the number of micro-batches: every block forward in order, then backward
from the top to the lowest block that a gradient has to reach. Streamed blocks share a few device buffers. As many
different blocks as there are buffers are loaded ahead, and the buffer whose block is needed last is overwritten, so the
blocks at the top, which are visited twice in a row, are not loaded again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

WARM_UP_STEPS = 2  # after them the buffers hold at a step's start what its predecessor left in the steady state


class Loads(NamedTuple):
    """Number of loads of one step by the direction of the visit that each is for."""

    forward: int
    backward: int


def step_visits(num_blocks: int, lowest: int) -> list[int]:
    """The blocks that an optimizer step visits, in order.

    Args:
        num_blocks: blocks of the model; the first `num_blocks` visits are the forward.
        lowest: the lowest block that backward reaches; `num_blocks` where it reaches none.
    """
    return [*range(num_blocks), *reversed(range(lowest, num_blocks))]


def next_loads(held: Sequence[int | None], upcoming: Iterable[int]) -> list[tuple[int, int]]:
    """The loads to queue before a visit; the plan and the run take the same decisions.

    Args:
        held: the block in each device buffer, None for an empty one.
        upcoming: streamed blocks to be visited, from the present visit on.

    Returns:
        (buffer, block) for each missing one of the next `len(held)` different blocks. A block takes an empty buffer,
        else the one whose block is needed last.
    """
    ahead = list(dict.fromkeys(upcoming))
    wanted = ahead[: len(held)]
    needed_at: dict[int | None, int] = {None: len(ahead) + 1, **{block: at for at, block in enumerate(ahead)}}
    loads, now = [], list(held)
    for block in wanted:
        if block in now:
            continue
        free = [buffer for buffer, holds in enumerate(now) if holds not in wanted]
        buffer = max(free, key=lambda index: (needed_at.get(now[index], len(ahead)), -index))
        now[buffer] = block
        loads.append((buffer, block))
    return loads


def loads_of_step(num_blocks: int, lowest: int, streamed: Collection[int], num_buffers: int) -> Loads:
    """The loads of one step in the steady state, counted by going through some steps.

    Args:
        num_blocks: blocks of the model.
        lowest: the lowest block that backward reaches; `num_blocks` where it reaches none.
        streamed: blocks that have to be loaded to be visited.
        num_buffers: device buffers that they share.
    """
    order = enumerate(step_visits(num_blocks, lowest))
    visits = [(block, position >= num_blocks) for position, block in order if block in set(streamed)]
    held: list[int | None] = [None] * num_buffers
    counted = [0, 0]
    for step in range(WARM_UP_STEPS + 1):
        for position in range(len(visits)):
            upcoming = [*visits[position:], *visits]
            for buffer, block in next_loads(held, (visited for visited, _ in upcoming)):
                held[buffer] = block
                in_backward = next(backward for visited, backward in upcoming if visited == block)
                if step == WARM_UP_STEPS:
                    counted[in_backward] += 1
    return Loads(*counted)

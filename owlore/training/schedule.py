"""The learning rate as a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from owlore.choices import SCHEDULES


def learning_rate(step: int, *, peak: float, steps: int, schedule: str, warmup: int) -> float:
    """The rate of one step: it rises over `warmup` steps, then follows the schedule.

    Args:
        step: global step, from 0.
        peak: rate at the end of the warm-up.
        steps: steps of the run, at which `linear` and `cosine` reach 0.
        schedule: one of SCHEDULES.
        warmup: steps of the warm-up.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    match schedule:
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        case "constant":
            return peak
        case _:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")

"""What a method is: which parameters are trained in which period, and how each is updated.

A strategy is built once for a run and is a pure function of the period afterwards. The engine knows nothing of methods;
it asks `units_at` at every switch and hands the answer to the rotating optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from owlore.blocks import Units
from owlore.kernels.adamw import AdamW
from owlore.optim import Rule
from owlore.sampling import DRAWS

SAMPLING = frozenset({"table", "active", "every", "draw", "floor", "on_switch"})
PROJECTION = frozenset({"rank", "refresh", "scale", "project_always_on"})


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """The settings that strategies read, already resolved against the model.

    inclusion: probability of each block to be drawn in a period, summing to the number drawn. always_on: groups of
    `owlore.blocks.GROUPS` trained in every period.
    """

    seed: int
    every: int
    draw: str
    inclusion: NDArray[np.float64]
    always_on: tuple[str, ...]
    rank: int | None
    refresh: int | None
    scale: float
    weight_decay: float
    state_bits: int = 32
    project_always_on: bool = False


class Strategy:
    """Base of the methods that train the model's own weights.

    name, paper, summary: for people. table: where the block scores come from by default (`auto`, `uniform`,
    `decrease`), None when nothing is sampled. reads: the options this method looks at beyond the common ones; any
    other is refused. defaults: options whose default differs from the engine's. preset: the paper's settings.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    table: ClassVar[str | None] = None
    reads: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[Mapping[str, Any]] = {}
    preset: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, units: Units, hyper: Hyper) -> None:
        self.units, self.hyper = units, hyper

    def blocks_at(self, period: int) -> tuple[int, ...]:
        """Sorted indexes of the blocks trained in this period; all of them unless a method samples."""
        del period
        return tuple(range(self.units.num_blocks))

    def rules_at(self, period: int) -> dict[str, Rule]:
        """Rule of every parameter trained in this period, by name."""
        return self.rules_for(self.blocks_at(period))

    def rules_for(self, blocks: Iterable[int]) -> dict[str, Rule]:
        """Rule of every parameter trained while these blocks are drawn, by name."""
        outside = self.units.parameters((), self.hyper.always_on)
        inside = self.units.parameters(blocks, ())
        rules = {name: self.rule(p.ndim, projectable=True) for name, p in inside.items()}
        project = self.hyper.project_always_on
        return rules | {name: self.rule(p.ndim, projectable=project) for name, p in outside.items()}

    def rule(self, ndim: int, *, projectable: bool) -> Rule:
        """Vectors are not decayed; matrices are projected where the method projects and the place allows it."""
        adam, bits = AdamW(decay=self.hyper.weight_decay if ndim > 1 else 0.0), self.hyper.state_bits
        if not (projectable and "rank" in self.reads):
            return Rule(adam=adam, bits=bits)
        return Rule(adam=adam, rank=self.hyper.rank, scale=self.hyper.scale, refresh=self.hyper.refresh, bits=bits)


class Sampled(Strategy):
    """A strategy that draws blocks by their inclusion probabilities at the start of every period."""

    table = "uniform"
    reads = SAMPLING

    def blocks_at(self, period: int) -> tuple[int, ...]:
        return DRAWS[self.hyper.draw](self.hyper.inclusion, self.hyper.seed, period)

"""The switch between periods: record the last one's gradient norms, draw, and make the drawn blocks active."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from owlore.optim import RotatingOptimizer, Switch, UpdateSpec
from owlore.strategies import PeriodLog, Strategy


@dataclass(kw_only=True)
class Rotation:
    """The active set of a run over its periods.

    Attributes:
        strategy: decides which blocks a period trains and how each parameter is updated.
        optimizer: holds state for exactly the active parameters.
        every: optimizer steps of a period; None for one period that is the whole run.
        set_active: called with the rules of the new active set when the leaving blocks are written back and before the
            joining ones get their state.
        agree: called with a name and a text that has to be the same in all processes.
        active: indexes of the blocks that the present period trains, ascending.
        period: the period whose parameters are active; None before the first and after the last.
        rules: how each active parameter is updated, by its name.
    """

    strategy: Strategy
    optimizer: RotatingOptimizer
    every: int | None
    set_active: Callable[[Mapping[str, UpdateSpec]], None] = lambda rules: None
    agree: Callable[[str, str], None] = lambda what, value: None
    active: tuple[int, ...] = ()
    period: int | None = None
    rules: dict[str, UpdateSpec] = field(default_factory=dict)

    def period_of(self, step: int) -> int:
        """The period that global step `step` (from 0) belongs to."""
        return step // self.every if self.every else 0

    def is_due(self, step: int) -> bool:
        """Whether a new period begins with global step `step`."""
        return self.period != self.period_of(step)

    def begin(self, step: int) -> Switch:
        """Begin the period of global step `step`; return what joined, stayed and left."""
        self._record_norms()
        self.period = self.period_of(step)
        self.strategy.adapt(self.period)
        self._read_strategy()
        self.agree("the drawn blocks", f"{self.period} {self.active} {sorted(self.rules)}")
        return self.optimizer.switch(self.rules, step, between=lambda: self.set_active(self.rules))

    def finish(self, step: int) -> Switch:
        """End the last period after `step` steps: weights are written back, all state is freed, nothing is trained."""
        self._record_norms()
        self.period, self.active, self.rules = None, (), {}
        return self.optimizer.switch({}, step, between=lambda: self.set_active({}))

    def next_blocks(self) -> tuple[int, ...]:
        """Blocks that the next period will draw, if an adaptive table does not change until then."""
        assert self.period is not None
        return self.strategy.blocks_at(self.period + 1)

    def restore(
        self, period: int, record: Mapping[str, Any], tensors: Mapping[str, Any], counters: Mapping[str, Any]
    ) -> None:
        """Go on inside a period.

        Args:
            period: the period whose parameters are active.
            record: the strategy's `PeriodLog` as a dictionary.
            tensors: the optimizer's state.
            counters: the optimizer's counters.
        """
        self.strategy.record = PeriodLog.from_dict(record)
        self.period = period
        self._read_strategy()
        self.set_active(self.rules)
        self.optimizer.load_state(tensors, counters, self.rules)

    def _read_strategy(self) -> None:
        assert self.period is not None
        self.active, self.rules = self.strategy.blocks_at(self.period), self.strategy.specs_at(self.period)

    def _record_norms(self) -> None:
        """Give the strategy the gradient norms of the present period."""
        if self.period is not None:
            self.strategy.close(self.period, self.active, *self.optimizer.take_norms())

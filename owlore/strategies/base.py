"""What a method is: which parameters are trained in which period, and how each is updated.

A strategy is built once for a run and is a pure function of the period afterwards, and of the tables recorded for the
periods so far. The engine knows nothing of methods; at every switch it offers what finished periods left behind
(`adapt`), asks `specs_at` and hands the answer to the rotating optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from htsr.errors import UsageError
from owlore.blocks import ModelParts
from owlore.choices import APOLLO, FIRA
from owlore.kernels.adamw import AdamW
from owlore.optim import UpdateSpec
from owlore.options import MethodOption, choice, number
from owlore.sampling import DRAWS

if TYPE_CHECKING:
    from owlore.injection import InjectedAdapter

OUTSIDE = frozenset({"always_on"})
SAMPLING = frozenset({"table", "active", "every", "draw", "floor", "on_switch"}) | OUTSIDE
PROJECTION = frozenset({"rank", "refresh", "scale", "project_side", "project_always_on"}) | OUTSIDE


LOW_RANK = {
    "residual": MethodOption(
        "none", choice("none", *FIRA), "Add what lies outside the basis, scaled (arXiv 2410.01623)."
    ),
    "scaling": MethodOption(
        "none", choice("none", *APOLLO), "Random basis; scale the gradient itself (arXiv 2412.05270)."
    ),
    "limit": MethodOption(1.01, number(1), "Most that the norm of such a part may grow in a step."),
    "moments": MethodOption(
        "rotate", choice("rotate", "keep"), "What a new basis does to Adam's moments; published: keep."
    ),
}


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """The settings that strategies read, already resolved against the model.

    inclusion: probability of each block to be drawn in a period, summing to the number drawn. always_on: groups of
    `owlore.choices.GROUPS` trained in every period. options: the method's own options by name. trained: names of the
    parameters that `Strategy.prepare` put into the model. floor: of inclusions, as asked for.
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
    project_larger: bool = False
    floor: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class PrepareContext:
    """What a method may look at before step 1, when it prepares the model.

    Attributes:
        options: the method's own options by name.
        seed: seed of the run.
        batches: gives the first so many micro-batches of the run as arguments of the model with unshifted labels; None
            where only shapes are known and no weight may be read (a plan).
        loss: mean loss in nats a trained token of a model and such a batch.
        saved: the notes that the preparation of this run left in a checkpoint; None in a new run.
    """

    options: Mapping[str, Any]
    seed: int
    batches: Callable[[int], Iterator[dict[str, Tensor]]] | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    saved: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class PeriodStats:
    """What a finished period left behind, as run.json and every checkpoint record it.

    steps: optimizer steps in which a gradient came. blocks: those drawn. norms: for each of them the root mean square
    over these steps of the norm of its gradient, before clipping, of the whole batch; of a projected matrix it is the
    norm in the projected space (the captured part). 0 where no step brought a gradient.
    """

    period: int
    steps: int
    blocks: tuple[int, ...]
    norms: tuple[float, ...]

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> PeriodStats:
        """What `to_dict` gave, back."""
        return cls(period=saved["period"], steps=saved["steps"], blocks=tuple(saved["blocks"]),
                   norms=tuple(saved["norms"]))  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"period": self.period, "steps": self.steps, "blocks": list(self.blocks), "norms": list(self.norms)}


@dataclass
class PeriodLog:
    """What is recorded of a run's periods: all that an adaptive rule may look at.

    past: the finished periods in order. tables: inclusion probabilities by period, only where a rule adapts them; the
    last one belongs to the period that is running.
    """

    past: list[PeriodStats] = field(default_factory=list)
    tables: list[list[float]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> PeriodLog:
        """What `to_dict` gave, back."""
        return cls(
            past=[PeriodStats.from_dict(row) for row in saved["past"]], tables=[list(t) for t in saved["tables"]]
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"past": [finished.to_dict() for finished in self.past], "tables": self.tables}


class Strategy:
    """Base of the methods; as it stands it trains the model's own weights.

    name, paper, summary: for people; share: of the parameters trained in a step; memory: what is held beside
    activations. adapts: the result is an adapter and not a model. own: options of this method alone. table: where the
    block scores come from by default (`auto`, `uniform`, `decrease`), None when nothing is sampled. reads: the options
    this method looks at beyond the common ones; any other is refused. defaults: options whose default differs from the
    engine's. preset: the paper's settings.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    share: ClassVar[str]
    memory: ClassVar[str]
    adapts: ClassVar[bool] = False
    method_options: ClassVar[Mapping[str, MethodOption]] = {}
    table: ClassVar[str | None] = None
    accepted_options: ClassVar[frozenset[str]] = OUTSIDE
    defaults: ClassVar[Mapping[str, Any]] = {}
    preset: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, parts: ModelParts, config: StrategyConfig) -> None:
        self.parts, self.config, self.record = parts, config, PeriodLog()
        if all(config.options.get(key, "none") != "none" for key in ("residual", "scaling")):
            raise UsageError("got --set residual and --set scaling, expected one of them: each replaces the update")

    def close(self, period: int, blocks: Sequence[int], squares: Mapping[str, float], steps: int) -> None:
        """Record a period that ends: `squares` are squared gradient norms by parameter, summed over `steps` updates."""
        home = self.parts.block_of()
        sums = dict.fromkeys(blocks, 0.0)
        for name, square in squares.items():
            if name in home:
                sums[home[name]] += square
        norms = tuple(math.sqrt(total / max(1, steps)) for total in sums.values())
        self.record.past.append(PeriodStats(period=period, steps=steps, blocks=tuple(blocks), norms=norms))

    def adapt(self, period: int) -> None:
        """`period` begins and everything before it is in the record: set its table, in a method whose tables change."""

    @classmethod
    def prepare(cls, model: nn.Module, start: PrepareContext) -> InjectedAdapter | None:
        """Put what is to be trained into the model, before its parts are found; None where that is its own weights.

        Raises: UsageError when the options do not fit the model.
        """
        del model, start
        return None

    def blocks_at(self, period: int) -> tuple[int, ...]:
        """Sorted indexes of the blocks trained in this period; all of them unless a method samples."""
        del period
        return tuple(range(self.parts.num_blocks))

    def specs_at(self, period: int) -> dict[str, UpdateSpec]:
        """Update of every parameter trained in this period, by name."""
        return self.specs_for(self.blocks_at(period))

    def specs_for(self, blocks: Iterable[int]) -> dict[str, UpdateSpec]:
        """Update of every parameter trained while these blocks are drawn, by name."""
        outside = self.parts.parameters((), self.config.always_on)
        inside = self.parts.parameters(blocks, ())
        specs = {name: self.spec(p.ndim, projectable=True) for name, p in inside.items()}
        project = self.config.project_always_on
        return specs | {name: self.spec(p.ndim, projectable=project) for name, p in outside.items()}

    def spec(self, ndim: int, *, projectable: bool) -> UpdateSpec:
        """Vectors are not decayed; matrices are projected where the method projects and the place allows it."""
        adam, bits = AdamW(decay=self.config.weight_decay if ndim > 1 else 0.0), self.config.state_bits
        if not (projectable and "rank" in self.accepted_options):
            return UpdateSpec(adam=adam, bits=bits)
        config, own = self.config, self.config.options
        return UpdateSpec(
            adam=adam, bits=bits, rank=config.rank, scale=config.scale, refresh=config.refresh,
            larger=config.project_larger, rotate=own.get("moments", "rotate") == "rotate",
            full_rank=next((own[key] for key in ("residual", "scaling") if own.get(key, "none") != "none"), None),
            limit=own.get("limit", 1.01),
        )  # fmt: skip


class Sampled(Strategy):
    """A strategy that draws blocks by their inclusion probabilities at the start of every period."""

    table = "uniform"
    accepted_options = SAMPLING

    def blocks_at(self, period: int) -> tuple[int, ...]:
        return DRAWS[self.config.draw](self.inclusion_at(period), self.config.seed, period)

    def inclusion_at(self, period: int) -> NDArray[np.float64]:
        """Inclusion probabilities of a period: the recorded table where the rule adapts, else the run's one table."""
        tables = self.record.tables
        return np.array(tables[period]) if period < len(tables) else self.config.inclusion

    def adapt(self, period: int) -> None:
        """Record the table of `period`; one recorded before (the run goes on inside that period) stays."""
        tables = self.record.tables
        if len(tables) == period and (found := self.next_inclusion(period, self.record.past)) is not None:
            tables.append(found.tolist())

    def next_inclusion(self, period: int, past: Sequence[PeriodStats]) -> NDArray[np.float64] | None:
        """The table of `period` as a pure function of what the periods before it recorded; for adaptive methods.

        It sums to the same whole number of blocks as the run's own table, `self.config.inclusion`. A method that adapts
        gives one for every period (the run's own where it has nothing to say); None means that it does not adapt.
        """

"""What a method is: which parameters are trained in which period, and how each is updated.

A strategy is built once for a run and is a pure function of the period afterwards, and of the tables recorded for the
periods so far. The engine knows nothing of methods; at every switch it offers what finished periods left behind
(`adapt`), asks `specs_at` and hands the answer to the rotating optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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

UPDATES = ("residual", "scaling")  # options that replace the projected update by one of full rank
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

    Attributes:
        seed: seed of the run.
        draw: how blocks are drawn, one of `owlore.choices.DRAWS`.
        inclusion: probability of each block to be drawn in a period, of shape (blocks,); they sum to the number drawn.
            None where nothing is sampled.
        always_on: groups of `owlore.choices.GROUPS` that are trained in every period.
        rank: rank of projected gradients; None for no projection.
        refresh: steps between projection bases; None for one basis an activation.
        scale: factor on projected updates.
        weight_decay: decoupled weight decay of matrices.
        state_bits: bits of each optimizer moment, 32 or 8.
        project_always_on: whether matrices outside the blocks are projected too.
        project_larger: whether the larger side of a matrix is projected instead of the smaller.
        floor: lower bound of inclusion probabilities as given; None where it was not.
        options: the method's own options by name.
        trained: names of the parameters that `Strategy.prepare` put into the model.
    """

    seed: int
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
    """What a method may use before step 1, when it prepares the model.

    Attributes:
        options: the method's own options by name.
        seed: seed of the run.
        batches: gives the first micro-batches of the run, as many as it is asked for, as arguments of the model with
            unshifted labels; None where only shapes are known and no weight may be read (a plan).
        loss: mean loss in nats a trained token of a model and such a batch.
        saved: the adapter's notes from a checkpoint of this run; None in a new run.
    """

    options: Mapping[str, Any]
    seed: int
    batches: Callable[[int], Iterator[dict[str, Tensor]]] | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    saved: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class PeriodStats:
    """What a finished period leaves behind, as run.json and every checkpoint record it.

    Attributes:
        period: index of the period, from 0.
        steps: optimizer steps in which a gradient came.
        blocks: indexes of the blocks that were drawn.
        norms: for each of them the root mean square, over these steps, of the norm of its gradient of the whole batch
            before clipping; of a projected matrix it is the norm of the projected gradient. 0 where no gradient came.
    """

    period: int
    steps: int
    blocks: list[int]
    norms: list[float]


@dataclass
class PeriodLog:
    """What is recorded of a run's periods: all that an adaptive rule may use.

    Attributes:
        finished: the finished periods in order.
        tables: inclusion probabilities by period, only where a rule adapts them; the last one belongs to the period
            that is running.
    """

    finished: list[PeriodStats] = field(default_factory=list)
    tables: list[list[float]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> PeriodLog:
        """Rebuild a log from what `to_dict` returned."""
        finished = [PeriodStats(**row) for row in saved["past"]]
        return cls(finished=finished, tables=[list(table) for table in saved["tables"]])

    def to_dict(self) -> dict[str, Any]:
        """The log as JSON."""
        return {"past": [asdict(period) for period in self.finished], "tables": self.tables}


class Strategy:
    """Base of the methods; as it stands it trains the model's own weights.

    Attributes:
        name: name on the command line.
        paper: reference of the method.
        summary: what it does, in a line.
        share: share of the parameters that a step trains, in words.
        memory: what is held beside activations, in words.
        adapts: whether the result is an adapter and not a model.
        method_options: options of this method alone.
        table: default source of the block scores (`auto`, `uniform`, `decrease`); None when nothing is sampled.
        accepted_options: the options this method reads beside those that all methods share; others are refused.
        defaults: options whose default is not the one of `TrainConfig`.
        preset: settings of the paper.
        record: what finished periods left behind.

    Args:
        parts: the model's parts.
        config: the settings.

    Raises:
        UsageError: two options replace the update.
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
        if all(config.options.get(key, "none") != "none" for key in UPDATES):
            raise UsageError("got --set residual and --set scaling, expected one of them: each replaces the update")

    def close(self, period: int, blocks: Sequence[int], squares: Mapping[str, float], steps: int) -> None:
        """Record a period that ends.

        Args:
            period: its index.
            blocks: indexes of the blocks that it trained.
            squares: squared gradient norms by parameter, summed over the updates.
            steps: number of updates in which a gradient came.
        """
        block_of = self.parts.block_of()
        sums = dict.fromkeys(blocks, 0.0)
        for name, square in squares.items():
            if name in block_of:
                sums[block_of[name]] += square
        norms = [math.sqrt(total / max(1, steps)) for total in sums.values()]
        self.record.finished.append(PeriodStats(period=period, steps=steps, blocks=list(blocks), norms=norms))

    def adapt(self, period: int) -> None:
        """Set the table of a period that begins, in a method whose tables change; the record has all before it."""

    @classmethod
    def prepare(cls, model: nn.Module, context: PrepareContext) -> InjectedAdapter | None:
        """Put an adapter into the model, before its parts are found, in a method that trains one.

        Args:
            model: the model, frozen.
            context: what the method may use.

        Returns:
            The adapter; None where the model's own weights are trained.

        Raises:
            UsageError: the options do not fit the model.
        """
        del model, context
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
        """How a parameter is updated; vectors are not decayed.

        Args:
            ndim: number of dimensions of the parameter.
            projectable: whether its gradient is projected, in a method that projects.
        """
        adam, bits = AdamW(decay=self.config.weight_decay if ndim > 1 else 0.0), self.config.state_bits
        if not (projectable and "rank" in self.accepted_options):
            return UpdateSpec(adam=adam, bits=bits)
        config, options = self.config, self.config.options
        return UpdateSpec(
            adam=adam, bits=bits, rank=config.rank, scale=config.scale, refresh=config.refresh,
            larger=config.project_larger, rotate=options.get("moments", "rotate") == "rotate",
            full_rank=next((options[key] for key in UPDATES if options.get(key, "none") != "none"), None),
            limit=options.get("limit", 1.01),
        )  # fmt: skip


class Sampled(Strategy):
    """A strategy that draws blocks by their inclusion probabilities at the start of every period."""

    table = "uniform"
    accepted_options = SAMPLING

    def blocks_at(self, period: int) -> tuple[int, ...]:
        tables = self.record.tables  # recorded by a rule that adapts; any other has one table for the run
        inclusion = np.array(tables[period]) if period < len(tables) else self.config.inclusion
        return DRAWS[self.config.draw](inclusion, self.config.seed, period)

    def adapt(self, period: int) -> None:
        """Record the table of `period`; a table that a checkpoint inside this period recorded stays."""
        tables = self.record.tables
        if len(tables) == period and (found := self.next_inclusion(self.record.finished)) is not None:
            tables.append(found.tolist())

    def next_inclusion(self, finished: Sequence[PeriodStats]) -> NDArray[np.float64] | None:
        """The table of the next period as a pure function of the finished ones; for adaptive methods.

        Args:
            finished: the finished periods in order.

        Returns:
            Inclusion probabilities that sum to the same whole number of blocks as `self.config.inclusion`, in every
            period; None in a method that does not adapt.
        """

"""The training loop: periods, steps, and around them evaluation, checkpoints and metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from htsr.errors import Interrupted, NotFinite, NotFound
from owlore.blocks import ModelParts
from owlore.data.arrange import Arrangement, Sequences
from owlore.data.batches import MicroBatch, collate
from owlore.data.packing import collate_packed
from owlore.data.tokenise import Encoded
from owlore.injection import InjectedAdapter
from owlore.io import checkpoint
from owlore.io.metrics import MetricsLog, memory_held
from owlore.training.backend import Backend
from owlore.training.distributed import ALONE, Ranks
from owlore.training.evaluate import held_out_loss
from owlore.training.loss import CausalLoss
from owlore.training.rotation import Rotation
from owlore.training.schedule import learning_rate
from owlore.training.signals import Interruptible
from owlore.training.step import StepResult, train_step


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The settings that the loop reads.

    Attributes:
        seed: seed of the run.
        steps: optimizer steps.
        batch: sequences of a micro-batch.
        lr, schedule, warmup: see `learning_rate`.
        clip: limit of the gradient norm; None for none.
        eval_every, save_every: steps between evaluations and between checkpoints; None for those at the ends alone.
        keep: checkpoints that are kept.
        keep_best: whether the model of the best evaluation is exported.
    """

    seed: int
    steps: int
    batch: int
    lr: float
    schedule: str
    warmup: int
    clip: float | None
    eval_every: int | None
    save_every: int | None
    keep: int
    keep_best: bool


@dataclass
class RunStats:
    """Counts of a run; saved with every checkpoint.

    Attributes:
        draws: periods in which each block was active.
        trainable_steps: sum over the steps of the number of trained parameters.
        lost_norm: by rotation the norm that was lost when master weights were rounded.
        step_seconds: seconds of each step with a trained token.
        tokens: tokens of all steps.
        idle_tokens: tokens of steps without a trained token, which do not count for the speed.
        best: `step` and `loss` of the best evaluation after step 0. The last evaluation of a run comes after its last
            checkpoint, so a run that is made longer does not count it.
    """

    draws: list[int]
    trainable_steps: int = 0
    lost_norm: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    idle_tokens: int = 0
    best: dict[str, Any] | None = None


@dataclass(kw_only=True)
class Trainer:
    """A run in progress.

    Attributes:
        parts: the model's parts.
        rotation: the active set over the periods; owns the strategy and the optimizer.
        backend: computes gradients and losses, wherever the blocks are stored.
        loss: the model's loss.
        config: the settings of the loop.
        data, arrangement: training rows, and which of them each step sees.
        eval_data: held-out rows, None without evaluation.
        metrics, checkpoints: the metrics log and the directory of checkpoints that the run writes.
        device: where the model computes.
        identity: what has to be the same in a run that resumes this one.
        stats: the counts of the run.
        ranks: the processes that train together.
        trained: names of the parameters that were ever active.
        step: optimizer steps done.
        injected: the adapter that is trained, where it is not the model itself.
        finished: whether the last period has ended.
        frozen_loss: the last held-out loss with frozen blocks in their quantised format.
        exported_step: the step whose weights the model holds at the end, where it is not the last.
    """

    parts: ModelParts
    rotation: Rotation
    backend: Backend
    loss: CausalLoss
    config: LoopConfig
    data: Encoded
    arrangement: Arrangement
    eval_data: Encoded | None
    metrics: MetricsLog
    checkpoints: Path
    device: torch.device
    identity: dict[str, Any]
    stats: RunStats
    ranks: Ranks = ALONE
    trained: set[str] = field(default_factory=set)
    step: int = 0
    injected: InjectedAdapter | None = None
    finished: bool = False
    frozen_loss: float | None = None
    exported_step: int | None = None

    def run(self, on_row: Callable[[dict[str, Any]], None]) -> None:
        """Train to the last step and evaluate; leave the final weights (the best with `keep_best`) in the model.

        Args:
            on_row: is given every row of metrics.jsonl; an empty one where nothing is evaluated.

        Raises:
            Interrupted: a signal was received; the checkpoint is complete.
            NotFinite: a loss or gradient norm was not finite; no update was applied.
        """
        self.loss.model.train()
        if self.step == 0:
            on_row(self.evaluate())
        with Interruptible() as interruption:
            while self.step < self.config.steps:
                if self.rotation.is_due(self.step):
                    self.rotate()
                try:
                    on_row(self.train_step())
                except NotFinite:
                    if self.step:  # the update was not applied, so this is the last good state
                        self.save()
                    raise
                last = self.step == self.config.steps
                if _due(self.step, self.config.eval_every) and not last:
                    on_row(self.evaluate())
                interrupted = self.ranks.any(interruption.received is not None)
                if _due(self.step, self.config.save_every) or last or interrupted or self._is_best_to_keep:
                    self.save()
                if interrupted and not last:
                    name = interruption.received.name if interruption.received else "a signal to another rank"
                    raise Interrupted(
                        f"{name} at step {self.step}: checkpoint written, go on with --resume {self.checkpoints.parent}"
                    )
        self.finish()
        on_row(self.evaluate())
        if self.config.keep_best:
            self.restore_best()

    # -- periods and steps -------------------------------------------------------------------------------------------

    def rotate(self) -> None:
        """Begin a period: make its parameters active, free the state of those that leave."""
        rotation = self.rotation
        done = rotation.begin(self.step)
        self.trained.update(rotation.rules)
        if done.left:
            self.stats.lost_norm.append(done.lost_norm)
        for block in rotation.active:
            self.stats.draws[block] += 1
        # An adaptive table may draw other blocks by then; what was not prefetched is read when it is drawn.
        if rotation.every and (rotation.period_of(self.step) + 1) * rotation.every < self.config.steps:
            self.backend.prefetch(rotation.next_blocks())

    def train_step(self) -> dict[str, Any]:
        """Take one optimizer step; return its metrics row."""
        started = time.perf_counter()
        config, sequences = self.config, self.arrangement.step(self.step + 1)
        own_sequences = list(enumerate(sequences))[self.ranks.rank :: self.ranks.size]
        lr = learning_rate(
            self.step, peak=config.lr, steps=config.steps, schedule=config.schedule, warmup=config.warmup
        )
        result = train_step(
            self.backend,
            self.rotation.optimizer,
            {index: collated(self.data, part) for index, part in own_sequences},
            step=self.step,
            lr=lr,
            clip=config.clip,
            seed=config.seed,
            ranks=self.ranks,
        )
        self.step += 1
        rows = [row for part in sequences for sequence in part for row in sequence]
        return self._record(time.perf_counter() - started, int(self.arrangement.lengths[rows].sum()), result, lr)

    def _record(self, seconds: float, tokens: int, result: StepResult, lr: float) -> dict[str, Any]:
        if result.loss is not None:  # a step without a trained token does not count for the speed
            self.stats.step_seconds.append(seconds)
        else:
            self.stats.idle_tokens += tokens
        self.stats.tokens += tokens
        states = self.rotation.optimizer.states
        self.stats.trainable_steps += sum(state.parameter.numel() for state in states.values())
        return self._row(
            "train", loss=result.loss, lr=lr, grad_norm=result.norm, tokens=tokens, tokens_per_s=tokens / seconds,
            exact=self.backend.exact,
        )  # fmt: skip

    def _row(self, split: str, *, exact: bool, **values: Any) -> dict[str, Any]:
        """Write a metrics row; in runs with quantised blocks it tells which weights its loss is of."""
        frozen = self.backend.frozen
        weights = {} if frozen is None else {"weights": "exact" if exact else frozen}
        return self.metrics.write(
            step=self.step, epoch=self.arrangement.epoch(self.step), split=split, mem_bytes=memory_held(self.device),
            state_bytes=self.rotation.optimizer.held().total, active_blocks=list(self.rotation.active), **weights,
            **values,
        )  # fmt: skip

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        """Compute the held-out loss; return its metrics row, empty without evaluation data.

        The loss is that of the weights that are trained against and, when training is finished, of the exported
        weights; the two differ where frozen blocks are quantised.
        """
        if self.eval_data is None:
            return {}
        exact = self.finished or self.backend.exact
        loss = comparable = self._held_out(exact=exact)
        if not self.backend.exact and self.finished:
            self.frozen_loss = comparable = self._held_out(exact=False)
        if self.step and (self.stats.best is None or comparable < self.stats.best["loss"]):
            self.stats.best = {"step": self.step, "loss": comparable}
        return self._row("eval", loss=loss, exact=exact)

    def _held_out(self, *, exact: bool) -> float:
        assert self.eval_data is not None
        loss = held_out_loss(
            self.loss,
            self.eval_data,
            batch=self.config.batch,
            device=self.device,
            losses=lambda batches: self.backend.losses(batches, exact=exact),
            ranks=self.ranks,
        )
        if not math.isfinite(loss):
            raise NotFinite(f"held-out loss {loss} at step {self.step}: the model's weights or the data are damaged")
        return loss

    # -- the end, and checkpoints ------------------------------------------------------------------------------------

    def finish(self) -> None:
        """End the last period: weights are written back, state is freed, nothing is trainable."""
        self.stats.lost_norm.append(self.rotation.finish(self.step).lost_norm)
        self.finished = True
        trained = self.backend.values(sorted(self.trained)) if self.ranks.size > 1 else {}
        self.ranks.agree_on_bits("the trained weights", trained)

    def save(self) -> None:
        """Write a checkpoint from which `restore` goes on bit for bit."""
        optimizer = self.rotation.optimizer
        tensors, counters = optimizer.state()
        names = optimizer.parameters if self._is_best_to_keep else self.trained
        if self.ranks.leads:
            self._write(tensors, counters, names)
        self.ranks.wait()

    def _write(self, tensors: dict[str, torch.Tensor], counters: dict[str, Any], names: Iterable[str]) -> None:
        checkpoint.save(
            self.checkpoints,
            self.step,
            weights={name: self.rotation.optimizer.parameters[name].data for name in names},
            exact=lambda name: self.backend.values([name])[name],
            optimizer=tensors,
            state={
                "identity": self.identity,
                "optimizer": counters,
                "active": list(self.rotation.active),
                "period": self.rotation.period,
                "trained": sorted(self.trained),
                "tally": vars(self.stats),
                "record": self.rotation.strategy.record.to_dict(),
                "notes": None if self.injected is None else self.injected.notes,
            },
        )
        best = self.stats.best if self.config.keep_best else None
        checkpoint.prune(self.checkpoints, self.config.keep, best=None if best is None else best["step"])

    @property
    def _is_best_to_keep(self) -> bool:
        best = self.stats.best
        return self.config.keep_best and best is not None and best["step"] == self.step

    def restore_best(self) -> None:
        """Put the weights of the best evaluation back into the model, unless it was the last one."""
        best = self.stats.best
        if best is not None and best["step"] != self.step:
            saved = checkpoint.load(checkpoint.path_of(self.checkpoints, best["step"]))
            self.backend.put(saved.weights)
            self.trained, self.exported_step = set(saved.state["trained"]), saved.step

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue where `saved` was written.

        Raises:
            NotFound: the checkpoint of the best evaluation, which `keep_best` needs, is gone.
        """
        self.stats = RunStats(**saved.state["tally"])
        best = self.stats.best
        if self.config.keep_best and best and not checkpoint.path_of(self.checkpoints, best["step"]).is_dir():
            raise NotFound(
                f"--keep-best: the checkpoint of the best evaluation (step {best['step']}) is not below "
                f"{self.checkpoints}; resume from the newest checkpoint of that run"
            )
        self.backend.put(saved.weights)
        self.step, self.trained = saved.step, set(saved.state["trained"])
        self.rotation.restore(saved.state["period"], saved.state["record"], saved.optimizer, saved.state["optimizer"])


def collated(data: Encoded, sequences: Sequences) -> MicroBatch:
    """The tensors of a micro-batch.

    Args:
        data: the rows.
        sequences: for each sequence the indexes of its rows: one, or several that do not attend to each other.
    """
    if any(len(rows) > 1 for rows in sequences):
        return collate_packed(data, sequences)
    return collate(data, [row for (row,) in sequences])


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0

"""The training loop: switch, gather projected gradients, update, and around it evaluation and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from htsr.errors import Interrupted, NotFinite, NotFound
from owlore.activations.checkpointing import Recompute
from owlore.attach import Attached
from owlore.blocks import Units
from owlore.data.arrange import Arrangement, Sequences
from owlore.data.batches import MicroBatch, collate
from owlore.data.packing import collate_packed
from owlore.data.tokenise import Encoded
from owlore.io import checkpoint
from owlore.io.metrics import MetricsLog, memory_held
from owlore.kernels.seeds import seed_for
from owlore.optim import RotatingOptimizer, Rule
from owlore.strategies import Record, Strategy
from owlore.training.distributed import ALONE, Ranks
from owlore.training.evaluate import held_out_loss
from owlore.training.loss import CausalLoss
from owlore.training.schedule import learning_rate
from owlore.training.signals import Interruptible
from owlore.training.streamed import Streaming


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What the loop reads of the configuration: how long, how often, how fast."""

    seed: int
    steps: int
    batch: int
    every: int | None  # optimizer steps of a period; None: one period for the whole run
    lr: float
    schedule: str
    warmup: int
    clip: float | None
    eval_every: int | None
    save_every: int | None
    keep: int
    keep_best: bool


@dataclass
class Tally:
    """What a run counts as it goes; saved with every checkpoint."""

    draws: list[int]
    trainable_steps: int = 0  # sum over steps of parameters trained
    lost_norm: list[float] = field(default_factory=list)  # a switch: norm that rounding masters back lost
    step_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    idle_tokens: int = 0  # of steps without a trained token, which have no part in the speed
    # Step and loss of the best evaluation after step 0. The last one of a run comes after its last checkpoint, so a run
    # that is made longer does not count the one with which the shorter run ended.
    best: dict[str, Any] | None = None


@dataclass(kw_only=True)
class Trainer:
    """A run in progress: the pieces, and the few numbers that change."""

    units: Units
    strategy: Strategy
    optimizer: RotatingOptimizer
    loss: CausalLoss
    recompute: Recompute
    put_on: ExitStack  # what lies on the blocks; closing it takes that off
    pace: Pace
    data: Encoded
    arrangement: Arrangement
    eval_data: Encoded | None
    metrics: MetricsLog
    checkpoints: Path
    device: torch.device
    identity: dict[str, Any]
    tally: Tally
    ranks: Ranks = ALONE
    trained: set[str] = field(default_factory=set)  # parameters that were ever active
    active: tuple[int, ...] = ()
    switched: int | None = None  # the period whose parameters are active
    step: int = 0  # optimizer steps done
    attached: Attached | None = None  # the adapter that is trained, where it is not the model itself
    streaming: Streaming | None = None  # where the blocks live, if not plainly on the device
    finished: bool = False  # the last activation has ended
    frozen_loss: float | None = None  # the last held-out loss with the frozen blocks as they were trained against
    exported_step: int | None = None  # the step whose weights the model holds at the end, where it is not the last

    def run(self, on_row: Callable[[dict[str, Any]], None]) -> None:
        """Train to the last step and measure; leave the final weights (the best with `keep_best`) in the model.

        Raises: Interrupted after a clean checkpoint, NotFinite before a bad update.
        """
        self.loss.model.train()
        if self.step == 0:
            on_row(self.evaluate())
        with Interruptible() as interruption:
            while self.step < self.pace.steps:
                if self.period_begins:
                    self.switch()
                try:
                    on_row(self.advance())
                except NotFinite:
                    if self.step:  # the update did not happen: what is held is the last good state
                        self.save()
                    raise
                last = self.step == self.pace.steps
                if _due(self.step, self.pace.eval_every) and not last:
                    on_row(self.evaluate())
                asked = self.ranks.any(interruption.asked is not None)
                if _due(self.step, self.pace.save_every) or last or asked or self._is_best_to_keep:
                    self.save()
                if asked and not last:
                    name = interruption.asked.name if interruption.asked else "a signal to another rank"
                    raise Interrupted(
                        f"{name} at step {self.step}: checkpoint written, go on with --resume {self.checkpoints.parent}"
                    )
        self.finish()
        on_row(self.evaluate())
        if self.pace.keep_best:
            self.return_to_best()

    # -- one period --------------------------------------------------------------------------------------------------

    @property
    def period(self) -> int:
        return self.step // self.pace.every if self.pace.every else 0

    @property
    def period_begins(self) -> bool:
        return self.switched != self.period

    def switch(self) -> None:
        """Make this period's parameters active and free what leaves."""
        self._close_period()
        self.switched = self.period
        self.strategy.adapt(self.period)
        rules = self.strategy.rules_at(self.period)
        self.active = self.strategy.blocks_at(self.period)
        self.ranks.agree("the drawn blocks", f"{self.period} {self.active} {sorted(rules)}")
        done = self.optimizer.switch(rules, self.step, between=lambda: self._settle(rules))
        self.trained.update(rules)
        if done.left:
            self.tally.lost_norm.append(done.lost_norm)
        for block in self.active:
            self.tally.draws[block] += 1
        self._aim_recompute(rules)
        self._expect_next()

    def _settle(self, rules: dict[str, Rule]) -> None:
        if self.streaming is not None:
            self.streaming.settle(rules)

    def _expect_next(self) -> None:
        """Draws are pure, so what the next period needs can be fetched during this one (a rule that adapts is guessed
        by its present table; a block that was not expected is read when it is drawn)."""
        if self.streaming is not None and self.pace.every and (self.period + 1) * self.pace.every < self.pace.steps:
            self.streaming.expect(self.strategy.blocks_at(self.period + 1))

    def _close_period(self) -> None:
        """Record the gradient norms that the period which ends has seen."""
        if self.step:
            period = (self.step - 1) // self.pace.every if self.pace.every else 0
            self.strategy.close(period, self.active, *self.optimizer.take_norms())

    def _aim_recompute(self, rules: dict[str, Rule]) -> None:
        """Backward reaches down to the lowest active block, or to the bottom when the embeddings are trained."""
        bottom = any(name in rules for name, _ in self.units.groups["embeddings"])
        self.recompute.lowest = 0 if bottom or not self.active else self.active[0]

    # -- one step ----------------------------------------------------------------------------------------------------

    def advance(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics row."""
        started = time.perf_counter()
        pace = self.pace
        batches = self.arrangement.step(self.step + 1)
        lr = learning_rate(self.step, peak=pace.lr, steps=pace.steps, schedule=pace.schedule, warmup=pace.warmup)
        loss = self._gather(batches)
        norm = None
        if loss is not None:
            total = self.optimizer.gradient_norm()
            norm = float(total)
            if not math.isfinite(norm):
                raise NotFinite(
                    f"gradient norm {norm} at step {self.step + 1} (loss {loss:.4g}): lower --lr or use bfloat16"
                )
            self.optimizer.update(lr, pace.clip, total)
        self.step += 1
        rows = [row for sequences in batches for sequence in sequences for row in sequence]
        tokens = int(self.arrangement.lengths[rows].sum())
        return self._record(time.perf_counter() - started, tokens, loss=loss, lr=lr, grad_norm=norm)

    def _gather(self, parts: list[Sequences]) -> float | None:
        """Forward and backward of all micro-batches; the mean loss a trained token, None where nothing is trained.

        The sum is divided by the step's number of trained tokens, over all ranks, so accumulating and working side by
        side equal one big batch.
        """
        mine = list(enumerate(parts))[self.ranks.rank :: self.ranks.size]
        batches = [(index, collated(self.data, part)) for index, part in mine]
        (tokens,) = self.ranks.totals(sum(batch.num_trained for _, batch in batches))
        if not tokens:
            return None
        if self.streaming is not None:
            (loss,) = self.ranks.totals(self._gather_streamed(self.streaming, dict(batches), int(tokens)))
            return self._finite(loss)
        losses: list[torch.Tensor] = []
        self.optimizer.micro_batch(self.step, last=not batches)
        for index, batch in batches:
            self.optimizer.micro_batch(self.step, last=index == mine[-1][0])
            with _seeded(seed_for(self.pace.seed, "dropout", self.step, index), self.device):
                part = self.loss(**batch.on(self.device), num_trained=batch.num_trained)
                mean = part / tokens
                losses.append(mean.detach())
                if mean.requires_grad:
                    (mean * self.optimizer.grad_scale).backward()
        # Asked for when all is queued, so that a GPU never waits for the host between two micro-batches. A loss that is
        # not finite is noticed before the update, and the other ranks hear of it before anyone leaves.
        (loss,) = self.ranks.totals(sum((value.item() for value in losses), 0.0))
        return self._finite(loss)

    def _gather_streamed(self, streaming: Streaming, batches: dict[int, MicroBatch], tokens: int) -> float:
        if not batches:
            self.optimizer.micro_batch(self.step, last=True)
            return 0.0
        losses = streaming.walk.gather(batches, tokens, seed=self.pace.seed, step=self.step)
        return sum(losses.tolist(), 0.0)

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise NotFinite(f"loss {loss} at step {self.step + 1}: lower --lr, or look at the data and weights")
        return loss

    def _record(self, seconds: float, tokens: int, **values: Any) -> dict[str, Any]:
        if values["loss"] is not None:  # a step without a trained token takes no time to speak of
            self.tally.step_seconds.append(seconds)
        else:
            self.tally.idle_tokens += tokens
        self.tally.tokens += tokens
        self.tally.trainable_steps += sum(slot.parameter.numel() for slot in self.optimizer.slots.values())
        return self.metrics.write(
            step=self.step, epoch=self._epoch, split="train", tokens=tokens, tokens_per_s=tokens / seconds,
            mem_bytes=memory_held(self.device), state_bytes=self.optimizer.held().total,
            active_blocks=list(self.active),
            **self._which(exact=self._exact), **values,
        )  # fmt: skip

    @property
    def _epoch(self) -> float:
        return self.arrangement.epoch(self.step)

    # -- around it ---------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        """Held-out loss as a metrics row; an empty record without evaluation data.

        It is of the weights that are trained against and, when training is finished, of the weights as they leave; the
        two differ where frozen blocks are quantised.
        """
        if self.eval_data is None:
            return {}
        exact = self.finished or self._exact
        loss = comparable = self._held_out(exact=exact)
        if not self._exact and self.finished:
            self.frozen_loss = comparable = self._held_out(exact=False)
        if self.step and (self.tally.best is None or comparable < self.tally.best["loss"]):
            self.tally.best = {"step": self.step, "loss": comparable}
        return self.metrics.write(
            step=self.step, epoch=self._epoch, split="eval", loss=loss, mem_bytes=memory_held(self.device),
            state_bytes=self.optimizer.held().total, active_blocks=list(self.active), **self._which(exact=exact),
        )  # fmt: skip

    @property
    def _exact(self) -> bool:
        """Are frozen blocks read with their own bits?"""
        return self.streaming is None or self.streaming.exact

    def _which(self, *, exact: bool) -> dict[str, str]:
        """The key of a row that says which weights its loss is of, in runs where there is a choice."""
        return {} if self.streaming is None else {"weights": "exact" if exact else self.streaming.frozen}

    def _held_out(self, *, exact: bool) -> float:
        assert self.eval_data is not None
        streaming = self.streaming
        losses = None if streaming is None else lambda batches: streaming.losses(batches, exact=exact)
        loss = held_out_loss(self.loss, self.eval_data, batch=self.pace.batch, device=self.device, losses=losses,
                             ranks=self.ranks)  # fmt: skip
        if not math.isfinite(loss):
            raise NotFinite(f"held-out loss {loss} at step {self.step}: the model's weights or the data are damaged")
        return loss

    def finish(self) -> None:
        """End the last activation: masters are written back, state is freed, nothing is trainable."""
        self._close_period()
        done = self.optimizer.switch({}, self.step, between=lambda: self._settle({}))
        self.tally.lost_norm.append(done.lost_norm)
        self.active, self.finished = (), True
        trained = self._weights(sorted(self.trained)) if self.ranks.size > 1 else {}
        self.ranks.agree_on_bits("the trained weights", trained)

    def save(self) -> Path:
        """A checkpoint from which `restore` goes on bit for bit."""
        tensors, counters = self.optimizer.state()
        names = self.optimizer.parameters if self._is_best_to_keep else self.trained
        path = checkpoint.path_of(self.checkpoints, self.step)
        if self.ranks.leads:
            self._write(tensors, counters, names)
        self.ranks.wait()
        return path

    def _write(self, tensors: dict[str, torch.Tensor], counters: dict[str, Any], names: Iterable[str]) -> None:
        checkpoint.save(
            self.checkpoints,
            self.step,
            weights={name: self.optimizer.parameters[name].data for name in names},
            exact=None if self.streaming is None else self.streaming.value,
            optimizer=tensors,
            state={
                "identity": self.identity,
                "optimizer": counters,
                "active": list(self.active),
                "period": self.switched,
                "trained": sorted(self.trained),
                "tally": vars(self.tally),
                "record": self.strategy.record.to_dict(),
                "notes": None if self.attached is None else self.attached.notes,
            },
        )
        best = self.tally.best if self.pace.keep_best else None
        checkpoint.prune(self.checkpoints, self.pace.keep, best=None if best is None else best["step"])

    @property
    def _is_best_to_keep(self) -> bool:
        best = self.tally.best
        return self.pace.keep_best and best is not None and best["step"] == self.step

    def return_to_best(self) -> None:
        """Put the weights of the best evaluation back into the model, unless it was the last one."""
        best = self.tally.best
        if best is not None and best["step"] != self.step:
            saved = checkpoint.load(checkpoint.path_of(self.checkpoints, best["step"]))
            self._put_back(saved.weights)
            self.trained, self.exported_step = set(saved.state["trained"]), saved.step

    def _weights(self, names: list[str]) -> dict[str, torch.Tensor]:
        if self.streaming is not None:
            return self.streaming.values(names)
        return {name: self.optimizer.parameters[name].data for name in names}

    def _put_back(self, weights: dict[str, torch.Tensor]) -> None:
        if self.streaming is not None:
            self.streaming.put(weights)
            return
        with torch.no_grad():
            for name, tensor in weights.items():
                self.optimizer.parameters[name].copy_(tensor)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue where `saved` was written."""
        self.tally = Tally(**saved.state["tally"])
        best = self.tally.best
        if self.pace.keep_best and best and not checkpoint.path_of(self.checkpoints, best["step"]).is_dir():
            raise NotFound(
                f"--keep-best: the checkpoint of the best evaluation (step {best['step']}) is not below "
                f"{self.checkpoints}; resume from the newest checkpoint of that run"
            )
        self._put_back(saved.weights)
        self.step, self.trained = saved.step, set(saved.state["trained"])
        self.active, self.switched = tuple(saved.state["active"]), saved.state["period"]
        self.strategy.record = Record.from_dict(saved.state["record"])
        rules = self.strategy.rules_at(saved.state["period"])
        self._settle(rules)
        self.optimizer.load_state(saved.optimizer, saved.state["optimizer"], rules)
        self._aim_recompute(rules)


def collated(data: Encoded, sequences: Sequences) -> MicroBatch:
    """The tensors of a micro-batch whose sequences hold one row each, or several kept apart."""
    if any(len(rows) > 1 for rows in sequences):
        return collate_packed(data, sequences)
    return collate(data, [row for (row,) in sequences])


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class _seeded:  # noqa: N801 - used as a context manager
    """torch's global generators at a known seed inside (dropout draws from them), as they were outside."""

    def __init__(self, seed: int, device: torch.device) -> None:
        devices = [device] if device.type == "cuda" else []
        self.seed, self.fork = seed, torch.random.fork_rng(devices=devices)

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *exception: Any) -> None:
        self.fork.__exit__(*exception)

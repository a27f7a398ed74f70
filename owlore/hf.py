"""Layer-sampled training inside `transformers.Trainer`: an optimizer and a callback.

    trainer = Trainer(model=model, args=args, train_dataset=rows, **bridge(model, args, table="table.json", active=2))

The optimizer draws blocks at the start of every period, projects gradients as they arrive and frees the state of blocks
that leave, as `owlore train` does; learning rate, decay, clipping, accumulation and seed are the Trainer's. What
`owlore train` does beyond that (backward that recomputes only what it reaches, gradients projected without being made,
the loss in chunks, exports that keep frozen bits) is not here. The `grad_norm` that Trainer logs is 0, because
gradients are freed before it is computed; the callback logs `owlore_grad_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import TrainerCallback

from htsr.console import notice
from htsr.errors import UsageError
from htsr.model.open import open_source
from owlore.blocks import find_parts, freeze
from owlore.config import SETTINGS, TrainConfig
from owlore.layer_table import find_table, scanned_table
from owlore.optim import RotatingOptimizer
from owlore.settings import master_policy, resolve, strategy_config
from owlore.strategies import PeriodLog
from owlore.training.rotation import Rotation
from owlore.training.step import clipped_update

# Settings that the bridge takes; the table is an argument of its own, and all others are the Trainer's.
_METHOD_SETTINGS = {name for name, setting in SETTINGS.items() if setting.metadata.get("method")}
TAKEN = (_METHOD_SETTINGS - {"table"}) | {"method", "weights", "state_bits", "set", "preset"}


# The optimizer whose hooks are on a model.
_BRIDGED: WeakKeyDictionary[nn.Module, RotatingOptimizer] = WeakKeyDictionary()


def bridge(
    model: nn.Module, args: Any, *, table: Any = None, tokenizer: Any = None, quiet: bool = False, **settings: Any
) -> dict[str, Any]:
    """Make the `optimizers` and `callbacks` of a Trainer over `model`, whose parameters are frozen here.

    Args:
        model: the model that the Trainer is given.
        args: the Trainer's `TrainingArguments`; seed, clipping, weight decay and learning rate are taken from them.
        table: `auto`, `uniform`, a file or a `htsr.LayerTable`; None for the method's default. `auto` scans the model.
        tokenizer: the model's tokenizer, with which a scan measures outliers (rule LOD).
        quiet: whether notes are left out.
        **settings: method, active, every, rank and so on, as in `owlore.train`.

    Returns:
        Keyword arguments of `Trainer`.

    Raises:
        UsageError: a setting that the Trainer has, an adapter method, several processes, or fp16 (gradients do not
            wait for a reduction or an unscaling); use `owlore train` there.
    """
    _check(args, settings)
    given = {"model": "(model in memory)", "data": "(the Trainer's)", "seed": args.seed, "clip": args.max_grad_norm,
             "weight_decay": args.weight_decay, **settings}  # fmt: skip
    config, strategy_class = resolve(TrainConfig.build(given))
    if strategy_class.adapts:
        raise UsageError(f"method {config.method} is an adapter: give Trainer a PEFT model, or use owlore train")
    parts = find_parts(model)
    notify = partial(notice, quiet=quiet)
    wanted = table if table is not None else (config.table if strategy_class.table is not None else None)
    found = find_table(
        wanted,
        num_blocks=parts.num_blocks,
        weights_sha256="",
        notify=notify,
        scan=lambda: scanned_table(
            model, tokenizer, weights_sha256=open_source(model).weights_sha256(), notify=notify, quiet=quiet
        ),
    )
    strategy = strategy_class(parts, strategy_config(config, found))
    if (before := _BRIDGED.get(model)) is not None:  # of a training that failed
        before.remove()
    freeze(model)
    inner = RotatingOptimizer(
        parts.parameters(range(parts.num_blocks), parts.groups),
        seed=config.seed,
        policy=master_policy(config),
        on_switch=config.on_switch,
    )
    _BRIDGED[model] = inner
    rotation = Rotation(
        strategy=strategy,
        optimizer=inner,
        every=config.every if "every" in strategy_class.accepted_options else None,
    )
    optimizer = LayerSampled(rotation, clip=config.clip, lr=args.learning_rate)
    return {"optimizers": (optimizer, None), "callbacks": [LayerSampling(optimizer)]}


class LayerSampled(torch.optim.Optimizer):
    """`RotatingOptimizer` as a torch optimizer: one group, whose learning rate a scheduler may set.

    Args:
        rotation: the active set over the periods, with its strategy and optimizer.
        clip: limit of the gradient norm, None for none.
        lr: first learning rate.
    """

    def __init__(self, rotation: Rotation, *, clip: float | None, lr: float) -> None:
        super().__init__(list(rotation.optimizer.parameters.values()), {"lr": lr})
        self.rotation, self.clip = rotation, clip
        self.steps = 0
        self.norm = 0.0

    def begin(self) -> None:
        """Make the period's blocks trainable, unless they are; call it when the model is on its device."""
        if not self.rotation.optimizer.states:
            self.rotation.begin(self.steps)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update from the gathered gradients; at the end of a period the next blocks are drawn.

        Args:
            closure: must be None, as gradients are gathered while backward runs.

        Raises:
            NotFinite: the gradient norm is not finite; no update was applied.
        """
        assert closure is None, "no closure: gradients are gathered while backward runs"
        lr = self.param_groups[0]["lr"]
        self.norm = clipped_update(self.rotation.optimizer, step=self.steps, lr=lr, clip=self.clip)
        self.steps += 1
        if self.rotation.is_due(self.steps):
            self.rotation.begin(self.steps)

    def finish(self) -> None:
        """Write masters back and free all state; nothing is trainable afterwards and no hook is left on the model.

        The callback calls it when training ends; after a `Trainer.train()` that failed, call it yourself.
        """
        self.rotation.finish(self.steps)

    def micro_batch(self, *, last: bool) -> None:
        """Announce the next backward.

        Args:
            last: whether it is the last one of its step.
        """
        self.rotation.optimizer.micro_batch(self.steps, last=last)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing, because gradients are freed as they arrive.

        Args:
            set_to_none: has no effect.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that an exact continuation needs, as tensors, numbers and strings: it loads with `weights_only`."""
        tensors, counters = self.rotation.optimizer.state()
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {"tensors": tensors, "counters": counters, "record": self.rotation.strategy.record.to_dict(),
                "steps": self.steps, "active": list(self.rotation.active), "param_groups": groups}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, also in the middle of a period.

        Args:
            state_dict: the saved state.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        self.steps = state_dict["steps"]
        if state_dict["counters"]["active"]:
            period = self.rotation.period_of(self.steps)
            self.rotation.restore(period, state_dict["record"], state_dict["tensors"], state_dict["counters"])
        else:
            self.rotation.strategy.record = PeriodLog.from_dict(state_dict["record"])


class LayerSampling(TrainerCallback):
    """Tells the optimizer where in a step the Trainer is, and logs the gradient norm as `owlore_grad_norm`.

    The methods are those of `transformers.TrainerCallback`; `args`, `state` and `control` are the Trainer's.

    Args:
        optimizer: the optimizer that the Trainer was given beside this callback.
    """

    def __init__(self, optimizer: LayerSampled) -> None:
        self.optimizer = optimizer
        self._micro = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Make the first blocks trainable; the model is on its device now.

        Args:
            args: the Trainer's arguments.
            state: the Trainer's state.
            control: the Trainer's control.
            model: the model; gradient checkpointing must not make frozen embeddings pass a gradient.
        """
        if args.gradient_checkpointing and hasattr(model, "disable_input_require_grads"):
            model.disable_input_require_grads()
        self.optimizer.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Announce the first backward of a step (`args`, `state`, `control`: the Trainer's)."""
        self._announce(args, 0)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Announce the next backward of a step (`args`, `state`, `control`: the Trainer's)."""
        self._announce(args, self._micro + 1)

    def _announce(self, args: Any, micro: int) -> None:
        self._micro = micro
        self.optimizer.micro_batch(last=micro == args.gradient_accumulation_steps - 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the gradient norm to the rows that hold a training loss.

        Args:
            args: the Trainer's arguments.
            state: the Trainer's state, whose history has a copy of the row already.
            control: the Trainer's control.
            logs: the row.
        """
        if logs is not None and "loss" in logs:
            for row in (logs, *state.log_history[-1:]):
                row["owlore_grad_norm"] = self.optimizer.norm

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write masters back and free all state (`args`, `state`, `control`: the Trainer's)."""
        self.optimizer.finish()


def _check(args: Any, settings: dict[str, Any]) -> None:
    if unknown := sorted(set(settings) - TAKEN):
        known = ", ".join(sorted(TAKEN))
        raise UsageError(
            f"{unknown[0]} is not a setting of the bridge (one of the Trainer's?), expected some of {known}"
        )
    if args.world_size > 1:
        raise UsageError(f"got {args.world_size} processes, expected one: use torchrun with owlore train")
    if args.fp16:
        raise UsageError("got fp16, whose scaled gradients the bridge cannot unscale: use bf16, or owlore train")
    moments = (args.adam_beta1, args.adam_beta2, args.adam_epsilon)
    if moments != (0.9, 0.999, 1e-8):
        raise UsageError(f"got adam betas and epsilon {moments}, expected 0.9, 0.999, 1e-8: the methods' own")

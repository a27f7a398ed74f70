"""What a run leaves behind: run.json, its plots, and the object that Python gets."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from htsr.errors import HtsrError
from owlore import plots
from owlore.config import TrainConfig
from owlore.io.metrics import memory_peak
from owlore.models.loading import DTYPES
from owlore.run.inputs import RunInputs
from owlore.run.model_card import held_out_change
from owlore.strategies import STRATEGIES
from owlore.training.trainer import Trainer

if TYPE_CHECKING:
    import pandas as pd

    from htsr import LayerTable
    from owlore.plan.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True, repr=False)
class Run:
    """A finished run.

    Attributes:
        directory: where the run was written.
        give: returns the trained model; a streamed model is put into one piece then. Use `model` instead.
        tokenizer: the model's tokenizer.
        table: the layer table; None where nothing was sampled.
        record: the contents of run.json.
        rows: the rows of metrics.jsonl.
        leads: whether this process wrote the directory; true of one of the processes that train together.
    """

    directory: Path
    give: Callable[[], Any]
    tokenizer: Any
    table: LayerTable | None
    record: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    leads: bool = True

    def __repr__(self) -> str:
        record = self.record
        held_out = "" if (change := held_out_change(record)) is None else f", held-out loss {change}"
        return f"Run({str(self.directory)!r}: {record['config']['method']}, {record['steps']} steps{held_out})"

    @cached_property
    def model(self) -> Any:
        """The trained model, on its device and in evaluation mode; of an adapter PEFT's model around it."""
        return self.give()

    @property
    def history(self) -> pd.DataFrame:
        """metrics.jsonl as a frame, one row an optimizer step or evaluation."""
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    @property
    def plot(self) -> RunPlots:
        """Plots of the run: `run.plot.loss()`, `run.plot.draws()`, `run.plot.draw_counts()`."""
        return RunPlots(self)


class RunPlots:
    """Plots of a run; each method draws on matplotlib Axes and returns them.

    Args:
        run: the finished run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def loss(self, ax: Any = None) -> Any:
        """Draw training and held-out loss by step.

        Args:
            ax: matplotlib Axes to draw on; None for Axes of a figure of its own.
        """
        return plots.plot_loss(self._run.history, _axes(ax))

    def draws(self, ax: Any = None) -> Any:
        """Draw which blocks each step trained.

        Args:
            ax: matplotlib Axes to draw on; None for Axes of a figure of its own.
        """
        return plots.plot_draws(self._run.history, len(self._run.record["draws"]), _axes(ax))

    def draw_counts(self, ax: Any = None) -> Any:
        """Draw how often each block was drawn, with the expected number.

        Args:
            ax: matplotlib Axes to draw on; None for Axes of a figure of its own.
        """
        return plots.plot_draw_counts(self._run.record["draws"], self._run.record["inclusion"], _axes(ax))


def run_record(inputs: RunInputs, trainer: Trainer, seconds: float) -> dict[str, Any]:
    """The contents of run.json: provenance, and what was counted and measured.

    Args:
        inputs: what the run started from.
        trainer: the trainer after its last step.
        seconds: seconds that the run took.
    """
    import transformers

    import htsr
    import owlore

    stats, loaded, prepared, table = trainer.stats, inputs.loaded, inputs.prepared, inputs.table
    parameters, periods = loaded.parameters, trainer.rotation.strategy.record.to_dict()
    evals = [row["loss"] for row in trainer.metrics.rows if row["split"] == "eval"]
    held = max((row["state_bytes"] for row in trainer.metrics.rows), default=0)
    return {
        "schema": "owlore-run/1",
        "status": "finished",
        "config": inputs.config.to_dict(),
        "model": {"id": loaded.id, "revision": loaded.revision, "weights_sha256": loaded.weights_sha256,
                  "config_sha256": loaded.config_sha256, "parameters": parameters,
                  "num_blocks": trainer.parts.num_blocks},
        "data": prepared.provenance["train"],
        "eval_data": prepared.provenance.get("eval"),
        "data_report": prepared.report.to_dict(),
        "table": None if table is None else {"rule": table.rule, "model": table.model, "gamma": table.gamma},
        "inclusion": trainer.identity["inclusion"],
        "draws": stats.draws,
        "periods": periods["past"],
        "tables": periods["tables"],
        "trained_parameters": len(trainer.trained),
        "trainable": stats.trainable_steps / max(1, trainer.step) / parameters,
        "steps": trainer.step,
        "tokens": stats.tokens,
        "seconds": seconds,
        "median_step_seconds": statistics.median(stats.step_seconds or [0.0]),
        "tokens_per_s": (stats.tokens - stats.idle_tokens) / (sum(stats.step_seconds) or 1.0),
        "peak_state_bytes": held,
        "parked_bytes": trainer.rotation.optimizer.parked_bytes(),
        "lost_norm": stats.lost_norm,
        "eval_loss_first": evals[0] if evals else None,
        "eval_loss_last": evals[-1] if evals else None,
        "eval_best": stats.best,
        "exported_step": trainer.step if trainer.exported_step is None else trainer.exported_step,
        "loss": "chunked" if trainer.loss.chunked else "whole logits: the model's own differ from head(decoder(x))",
        "residency": trainer.backend.record(),
        "eval_loss_last_frozen": trainer.frozen_loss,
        "device": str(trainer.device),
        "processes": trainer.ranks.size,
        "versions": {"owlore": owlore.__version__, "htsr": htsr.__version__, "torch": torch.__version__,
                     "transformers": transformers.__version__, "python": platform.python_version()},
        **memory_peak(trainer.device),
    }  # fmt: skip


def save_plots(run: Run) -> None:
    """Write plots/loss.png, draws.png and draw_counts.png."""
    directory = run.directory / "plots"
    directory.mkdir(exist_ok=True)
    for name in ("loss", "draws", "draw_counts"):
        getattr(run.plot, name)().figure.savefig(directory / f"{name}.png", dpi=150)


def _axes(ax: Any) -> Any:
    from htsr.plots import new_axes

    return new_axes(7.2, 4.0) if ax is None else ax


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def memory_advice(trainer: Trainer, config: TrainConfig, table: LayerTable | None) -> str:
    """A line for a run that does not fit: what is held, as counted, and what other settings would save, as planned.

    Args:
        trainer: the trainer of the run that failed.
        config: the settings.
        table: the layer table; None where nothing is sampled.
    """
    weights = sum(p.nbytes for p in trainer.parts.model.parameters())
    held = trainer.rotation.optimizer.held()
    peak = memory_peak(trainer.device)["peak_bytes"]
    rest = max(0, peak - weights - held.total)
    return (
        f"out of memory at step {trainer.step + 1}: weights {weights / 1e9:.2f} GB, masters {held.masters / 1e9:.2f}, "
        f"moments {held.moments / 1e9:.2f}, projectors {held.projectors / 1e9:.2f}, activations and the rest up to "
        f"{rest / 1e9:.2f}; {_savings(trainer, config, table)}"
    )


def _savings(trainer: Trainer, config: TrainConfig, table: LayerTable | None) -> str:
    """The five changes that would save most, each alone."""
    from owlore.plan.model_spec import spec_of_config
    from owlore.plan.planner import Planner

    model, strategy = trainer.parts.model, STRATEGIES[config.method]

    def describe(other: TrainConfig) -> ModelSpec:
        dtype = DTYPES[other.dtype] if other.dtype != "auto" else next(model.parameters()).dtype
        return spec_of_config(model.config, torch.float32 if other.weights == "fp32" else dtype, other, strategy)

    longest = config.seq_len if config.packing else int(trainer.arrangement.lengths.max())
    planner = Planner(
        strategy=strategy, describe=describe, device=trainer.device.type, table=table, tokens=longest,
        processes=trainer.ranks.size,
    )  # fmt: skip
    try:
        advice = planner.advised(config).advice
    except (HtsrError, RuntimeError, ValueError, MemoryError):  # the error that it explains must not be lost over it
        return "see `owlore plan` for what other settings would save"
    named = ", ".join(f"{piece.change} {piece.saves / 1e9:.2f} GB ({piece.price})" for piece in advice[:5])
    return f"planned savings, each alone: {named}" if named else "no setting of this method saves more"

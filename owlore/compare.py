"""Comparing finished runs: their cost and their losses, from the files in their directories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owlore.io.finished_run import read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    "run", "method", "steps", "tokens", "loss_before", "loss_after", "trainable", "seconds_per_step", "tokens_per_s",
    "peak_bytes", "peak_state_bytes",
)  # fmt: skip


def compare_runs(directories: Sequence[str | Path]) -> list[dict[str, Any]]:
    """A row for each run with the keys of `COLUMNS`; the losses are those on held-out data, or None."""
    table = []
    for directory in directories:
        record, _ = read_run(directory)
        row = {"run": Path(directory).name, "method": record["config"]["method"]}
        row |= {"loss_before": record["eval_loss_first"], "loss_after": record["eval_loss_last"]}
        row |= {"seconds_per_step": record["median_step_seconds"]}
        row |= {key: record[key] for key in ("steps", "tokens", "trainable", "tokens_per_s", "peak_bytes")}
        table.append({key: (row | {"peak_state_bytes": record["peak_state_bytes"]})[key] for key in COLUMNS})
    return table


def data_differ(directories: Sequence[str | Path]) -> bool:
    """Whether the runs have different data, so that their losses are not comparable."""
    records = [read_run(directory)[0] for directory in directories]
    seen = {json.dumps([r["data"]["sha256"], (r["eval_data"] or {}).get("sha256")]) for r in records}
    return len(seen) > 1


def begun_quantised(directories: Sequence[str | Path]) -> list[str]:
    """Names of the runs whose first loss is with quantised frozen blocks and whose last with the exported weights."""
    return [Path(d).name for d in directories if read_run(d)[0].get("eval_loss_last_frozen") is not None]


def plot_held_out(directories: Sequence[str | Path], ax: Axes, *, against: str = "step") -> Axes:
    """Plot the training loss (mean over a tenth of the run) and the held-out loss of each run.

    Args:
        directories: Run directories.
        ax: Axes to plot on.
        against: "step" or "seconds".

    Returns:
        `ax`.
    """
    import pandas as pd

    for number, directory in enumerate(directories):
        record, rows = read_run(directory)
        frame = pd.DataFrame(rows)
        train = frame[frame["split"] == "train"].dropna(subset=["loss"])
        held_out = frame[frame["split"] == "eval"]
        scale = 1.0 if against == "step" else record["median_step_seconds"]
        colour = f"C{number % 10}"
        smooth = train["loss"].rolling(max(1, len(train) // 10), min_periods=1).mean()
        ax.plot(
            train["step"] * scale, smooth, color=colour, label=f"{Path(directory).name} ({record['config']['method']})"
        )
        ax.plot(held_out["step"] * scale, held_out["loss"], "o", color=colour, markersize=6, markeredgecolor="white")
    ax.set(xlabel="optimizer step" if against == "step" else "seconds of training (median step)",
           ylabel="loss (nats a trained token)")  # fmt: skip
    ax.set_title("Loss: lines on training data, dots held out", loc="left", fontweight="bold", fontsize=11)
    ax.legend(frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    return ax

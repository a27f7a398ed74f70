"""Plots of a run, as functions `(data, ax) -> ax` that neither fit nor show anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

BLUE, ORANGE, GREY = "#2a6f97", "#e07a3f", "#b8bec4"


def plot_loss(history: pd.DataFrame, ax: Axes) -> Axes:
    """Training loss by step, with a moving average over a twentieth of the run, and held-out loss."""
    train = history[history["split"] == "train"].dropna(subset=["loss"])
    held_out = history[history["split"] == "eval"]
    window = max(1, len(train) // 20)
    steps = "train, a step"
    if window > 1:
        ax.plot(train["step"], train["loss"], color=GREY, linewidth=0.8, label=steps)
    smooth = train["loss"].rolling(window, min_periods=1).mean()
    ax.plot(train["step"], smooth, color=BLUE, linewidth=1.8, label=f"train, mean of {window}" if window > 1 else steps)
    if len(held_out):
        ax.plot(held_out["step"], held_out["loss"], "o-", color=ORANGE, markersize=5, label="held out")
    ax.set(xlabel="optimizer step", ylabel="loss (nats a trained token)")
    _count(ax.xaxis)
    return _tidy(ax, "Loss")


def plot_draws(history: pd.DataFrame, num_blocks: int, ax: Axes) -> Axes:
    """The blocks that were trained at each step, as an image with a row for each block."""
    train = history[history["split"] == "train"]
    raster = np.zeros((num_blocks, len(train)))
    for column, active in enumerate(train["active_blocks"]):
        raster[list(active), column] = 1
    first, last = (int(train["step"].iloc[0]), int(train["step"].iloc[-1])) if len(train) else (1, 1)
    ax.imshow(raster, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest",
              extent=(first - 0.5, last + 0.5, -0.5, num_blocks - 0.5))  # fmt: skip
    ax.set(xlabel="optimizer step", ylabel="block (0 is nearest the input)")
    _count(ax.xaxis, ax.yaxis)
    ax.set_title("Which blocks were trained when", loc="left", fontweight="bold", fontsize=11)
    return ax


def plot_draw_counts(draws: Sequence[int], inclusion: Sequence[float] | None, ax: Axes) -> Axes:
    """Number of draws of each block, and the number expected from the inclusion probabilities unless they are None."""
    blocks = np.arange(len(draws))
    ax.bar(blocks, draws, color=BLUE, width=0.7, label="drawn")
    if inclusion is not None:
        periods = sum(draws) / max(1e-12, float(np.sum(inclusion)))
        ax.plot(blocks, np.asarray(inclusion) * periods, "_", color=ORANGE, markersize=12, markeredgewidth=2.5,
                label="expected")  # fmt: skip
    ax.set(xlabel="block (0 is nearest the input)", ylabel="periods")
    _count(ax.xaxis, ax.yaxis)
    return _tidy(ax, "How often each block was drawn")


def _count(*axes: Axis) -> None:
    """Set ticks at integers only."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def _tidy(ax: Axes, title: str) -> Axes:
    ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#eceff1", linewidth=0.8)
    ax.set_axisbelow(True)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=9)
    return ax

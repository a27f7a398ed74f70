"""Pictures of a study: each a function of arms and axes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from analyse import Arm, mean_curve, not_dominated
from matplotlib.figure import Figure
from study import Study

WINDOW = 10
OF_NORMS = ("lora", "full", "owlore-lod", "owlore-uniform")
OF_DOTA = ("full", "dota", "dota-random")


def all_plots(study: Study, arms: Sequence[Arm], directory: Path) -> list[tuple[str, str]]:
    """Draw what the arms allow; file names with captions."""
    directory.mkdir(exist_ok=True)
    by_name = {arm.name: arm for arm in arms}
    norms, dota = ([by_name[n] for n in names if n in by_name] for names in (OF_NORMS, OF_DOTA))
    groups = {name: spec["group"] for name, spec in study.arms.items() if "group" in spec}
    wanted: list[tuple[str, str, Callable[[Any], Any], bool]] = [
        ("pareto-time.png", "Test loss against CPU seconds of a run, scan included; the line joins what nothing beats.",
         lambda ax: pareto(arms, lambda arm: arm.cpu_seconds, "CPU seconds of a run", ax), True),
        ("pareto-memory.png", "Test loss against training state as counted (masters, moments, projectors).",
         lambda ax: pareto(arms, lambda arm: arm.mean("peak_bytes", "state") / 1e6, "training state, MB", ax), True),
        ("pareto-resident.png", "Test loss against the growth of the process, libraries included.",
         lambda ax: pareto(arms, lambda arm: arm.mean("peak_bytes", "resident_above_start") / 1e6,
                           "peak resident set above start, MB", ax), True),
        ("exact-time.png", "Test questions not answered word for word, against CPU seconds of a run.",
         lambda ax: pareto(arms, lambda arm: arm.cpu_seconds, "CPU seconds of a run", ax, wrong=True), True),
        ("exact-memory.png", "The same against training state as counted.",
         lambda ax: pareto(arms, lambda arm: arm.mean("peak_bytes", "state") / 1e6, "training state, MB", ax,
                           wrong=True), True),
        ("curves.png", f"Training loss, mean over seeds and the {WINDOW} steps before, at the chosen learning rate.",
         lambda ax: curves(arms[:10], ax), True),
        ("update-norms.png", "How far each block's weights moved, relative to their norm (LISA's observation).",
         lambda ax: update_norms(norms, ax), len(norms) > 1),
        ("dota.png", "Full fine-tuning, DoTA, DoTA from random cores on one axis: training loss, held-out as dots.",
         lambda ax: curves(dota, ax, held_out=True), len(dota) > 1),
        ("budget.png", "Test loss against the share of parameters trained.",
         lambda ax: budget(arms, groups, ax), bool(groups)),
    ]  # fmt: skip
    made = []
    for name, caption, paint, possible in wanted:
        if possible:
            figure = Figure(figsize=(7.2, 4.6), dpi=110, layout="constrained")
            ax = figure.add_subplot()
            ax.spines[["top", "right"]].set_visible(False)
            paint(ax)
            figure.savefig(directory / name, metadata={"Software": None})
            made.append((name, caption))
    return made


def pareto(arms: Sequence[Arm], cost: Callable[[Arm], float], label: str, ax: Any, wrong: bool = False) -> Any:
    """A point an arm, with the standard deviation over seeds; the front is joined. wrong: of answers, not of loss."""
    figures = [arm.values("exact" if wrong else "test_loss").values() for arm in arms]
    heights = [1 - statistics.fmean(values) if wrong else statistics.fmean(values) for values in figures]
    points = [(cost(arm), height) for arm, height in zip(arms, heights, strict=True)]
    front = sorted(not_dominated(points), key=lambda i: points[i])
    ax.plot([points[i][0] for i in front], [points[i][1] for i in front], color="0.75", zorder=1)
    for i, (arm, (x, y)) in enumerate(zip(arms, points, strict=True)):
        ax.errorbar(
            x, y, yerr=statistics.stdev(figures[i]), fmt="o", color="C0" if i in front else "0.45", capsize=2, zorder=2
        )
        ax.annotate(arm.name, (x, y), xytext=(5, 3 if i % 2 else -9), textcoords="offset points", fontsize=7)
    ax.set(xlabel=label, ylabel="share of wrong answers" if wrong else "test loss (nats a token)")
    return ax


def curves(arms: Sequence[Arm], ax: Any, held_out: bool = False) -> Any:
    for number, arm in enumerate(arms):
        steps, losses = mean_curve(arm, WINDOW)
        colour = f"C{number % 10}"
        ax.plot(steps, losses, color=colour, label=f"{arm.name} (lr {arm.lr:g})", linewidth=1.2)
        if held_out:
            ax.plot(steps[-1], arm.mean("test_loss"), "o", color=colour, markeredgecolor="white")
    ax.set(xlabel="optimizer step", ylabel="loss (nats a trained token)")
    ax.legend(frameon=False, fontsize=7)
    return ax


def update_norms(arms: Sequence[Arm], ax: Any) -> Any:
    for arm in arms:
        norms = [run["update_norms"] for run in arm.runs.values()]
        means = [sum(column) / len(column) for column in zip(*norms, strict=True)]
        ax.plot(range(len(means)), means, "o-", label=arm.name, markersize=4)
    ax.set(xlabel="block", ylabel="||W - W0|| / ||W0||", ylim=(0, None))
    ax.legend(frameon=False, fontsize=8)
    return ax


def budget(arms: Sequence[Arm], groups: dict[str, str], ax: Any) -> Any:
    for number, group in enumerate(dict.fromkeys(groups.values())):
        members = sorted((a.mean("trainable"), a.mean("test_loss")) for a in arms if groups.get(a.name) == group)
        ax.plot([x for x, _ in members], [y for _, y in members], "o-", color=f"C{number}", label=group)
    ax.set(xlabel="share of parameters trained", ylabel="test loss (nats a token)", xscale="log")
    ax.legend(frameon=False, fontsize=8)
    return ax

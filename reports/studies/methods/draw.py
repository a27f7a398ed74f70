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
    on_gpu = any(arm.on_gpu for arm in arms)
    clock = "seconds of a run on the shared card" if on_gpu else "CPU seconds of a run"
    peak = (
        "peak allocated on the card, weights included" if on_gpu else "peak growth of the process, libraries included"
    )
    groups = {name: spec["group"] for name, spec in study.arms.items() if "group" in spec}
    wanted: list[tuple[str, str, Callable[[Any], Any], bool]] = [
        ("pareto-time.png", f"Test loss against {clock}, scan included; the line joins what nothing beats.",
         lambda ax: pareto(arms, lambda arm: arm.seconds, clock, ax), True),
        ("pareto-memory.png", "Test loss against training state as counted (masters, moments, projectors).",
         lambda ax: pareto(arms, lambda arm: arm.mean("peak_bytes", "state") / 1e6, "training state, MB", ax), True),
        ("pareto-resident.png", f"Test loss against {peak}.",
         lambda ax: pareto(arms, lambda arm: arm.peak_bytes / 1e6, f"{peak}, MB", ax), True),
        ("exact-time.png", f"Test questions not answered word for word, against {clock}.",
         lambda ax: pareto(arms, lambda arm: arm.seconds, clock, ax, wrong=True), True),
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
            figure = Figure(figsize=(7.2, 5.2), dpi=110, layout="constrained")
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
    for i, (x, y) in enumerate(points):
        ax.errorbar(
            x, y, yerr=statistics.stdev(figures[i]), fmt="o", color="C0" if i in front else "0.45", ecolor="0.85",
            capsize=2, markersize=4, zorder=2,
        )  # fmt: skip
    ax.set(xlabel=label, ylabel="share of wrong answers" if wrong else "test loss (nats a token)")
    name_points(ax, [arm.name for arm in arms], points)
    return ax


def name_points(ax: Any, names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Each name to the right of its point, moved up or down to where no other name is, with a line back to it."""
    height, letter, gap = 8.0, 4.3, 6.0  # points of a line, of a letter, from the mark to its name
    ax.margins(x=0.16)
    ax.figure.draw_without_rendering()  # the layout decides where points lie on the page
    scale = 72 / ax.figure.dpi
    places = [tuple(scale * at for at in ax.transData.transform(point)) for point in points]
    taken: list[tuple[float, float, float]] = []  # left, right and middle of the names so far
    for i in sorted(range(len(names)), key=lambda i: places[i][1]):
        x, y = places[i]
        left, right = x + gap, x + gap + letter * len(names[i])
        moves = sorted((step * height / 2 for step in range(-60, 61)), key=abs)
        near = [middle for start, end, middle in taken if start < right and left < end]
        move = next(m for m in moves if all(abs(middle - y - m) >= height for middle in near))
        taken.append((left, right, y + move))
        line = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        ax.annotate(
            names[i], points[i], xytext=(gap, move), textcoords="offset points", fontsize=7, va="center",
            arrowprops=line if abs(move) > height else None,
        )  # fmt: skip


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
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize=8)
    return ax


def budget(arms: Sequence[Arm], groups: dict[str, str], ax: Any) -> Any:
    for number, group in enumerate(dict.fromkeys(groups.values())):
        members = sorted((a.mean("trainable"), a.mean("test_loss")) for a in arms if groups.get(a.name) == group)
        ax.plot([x for x, _ in members], [y for _, y in members], "o-", color=f"C{number}", label=group)
    ax.set(xlabel="share of parameters trained", ylabel="test loss (nats a token)", xscale="log")
    ax.set_xticks([0.02, 0.05, 0.1, 0.2], ["2 %", "5 %", "10 %", "20 %"])
    ax.tick_params(axis="x", which="minor", labelbottom=False)
    ax.legend(frameon=False, fontsize=8)
    return ax

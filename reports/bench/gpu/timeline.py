"""A step as a picture: for each block its visits, the copies of its weights and the stalls for them, over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# kind -> (share of the row's height that a bar begins at, its height)
PLACES = {"visit": (0.35, 0.5), "copy": (0.08, 0.22), "fetch": (0.08, 0.1), "unload": (0.2, 0.1), "stall": (0.35, 0.5)}
COLOURS = {
    ("visit", "forward"): "#2f6690", ("visit", "backward"): "#c1572f", ("copy", "forward"): "#8fbcdb",
    ("copy", "backward"): "#eeb08e", ("fetch", "backward"): "#6a994e", ("unload", "forward"): "#a7c957",
    ("stall", "forward"): "#111111", ("stall", "backward"): "#111111", ("loss", ""): "#8a5a9e",
    ("update", ""): "#9a9a9a",
}  # fmt: skip
NAMES = {
    ("visit", "forward"): "visit upwards", ("visit", "backward"): "visit downwards",
    ("copy", "forward"): "copy for a visit upwards", ("copy", "backward"): "copy for a visit downwards",
    ("fetch", "backward"): "boundary back", ("unload", "forward"): "boundary away",
    ("stall", "forward"): "compute waits", ("loss", ""): "head and loss", ("update", ""): "update",
}  # fmt: skip
Spans = list[list[Any]]  # kind, block, start, end; seconds


def directed(spans: Spans) -> list[tuple[str, str, int | None, float, float]]:
    """Each span with the direction of the visit that it is or is for: the first of a block goes upwards."""
    visits: dict[int, list[float]] = {}
    for kind, block, start, _ in spans:
        if kind == "visit":
            visits.setdefault(block, []).append(start)
    found = []
    for kind, block, start, end in spans:
        direction = ""
        if block is not None:
            # A copy after a block's last visit is for the next step, which begins upwards.
            later = [number for number, at in enumerate(visits.get(block, [])) if at >= start]
            direction = "backward" if later and later[0] == 1 else "forward"
            direction = {"fetch": "backward", "unload": "forward"}.get(kind, direction)
        found.append((kind, direction, block, start, end))
    return found


def draw_timeline(spans: Spans, row: str, device: str, path: Path) -> None:
    """Write the picture; time is in milliseconds, block 0 is the lowest row."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    placed = directed(spans)
    blocks = 1 + max(block for _, _, block, _, _ in placed if block is not None)
    copied = {block for kind, _, block, _, _ in placed if kind == "copy"}
    figure = Figure(figsize=(9.0, 1.6 + 0.24 * (blocks + 1)), dpi=150, layout="constrained")
    ax = figure.add_subplot()
    for kind, direction, block, start, end in placed:
        low, height = PLACES.get(kind, (0.2, 0.6))
        level, colour = blocks if block is None else block, COLOURS[kind, direction]
        bar = [(1e3 * start, 1e3 * (end - start))]  # with an edge: a short one is to be seen too
        ax.broken_barh(bar, (level + low, height), linewidth=0.8, edgecolor=colour, facecolor=colour)
    for block in range(1, blocks + 1):
        ax.axhline(block, color="#e4e4e4", linewidth=0.5, zorder=0)
    labels = [f"{block}" if block in copied else f"* {block}" for block in range(blocks)]
    ax.set_yticks([block + 0.5 for block in range(blocks + 1)], [*labels, "all"], fontsize=7)
    ax.set(xlabel="milliseconds of one step", ylabel="block (* is not copied)", ylim=(0, blocks + 1), xlim=(0, None))
    note = (
        "; there a copy is done when it is asked for, and nothing overlaps: no word on a GPU" if device == "CPU" else ""
    )
    ax.set_title(f"{row}, measured on {device}{note}", fontsize=8, loc="left")
    seen = {(kind, direction) for kind, direction, *_ in placed}
    handles = [Patch(color=COLOURS[key], label=name) for key, name in NAMES.items() if key in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)

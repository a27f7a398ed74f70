"""Progress of a run: a bar on a terminal, about twenty lines elsewhere; trackers get the rows too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from owlore.io.metrics import spans
from owlore.io.trackers import Tracker


def reporter(
    bar: Any, notify: Callable[[str], None], steps: int, trackers: Sequence[Tracker]
) -> Callable[[dict[str, Any]], None]:
    """Make a function that passes metrics rows to the trackers and shows them.

    Args:
        bar: a tqdm bar over the steps; where it is disabled, rows are shown as lines.
        notify: is given what the user should know, one line at a time.
        steps: steps of the run.
        trackers: get every row.
    """
    stride = max(1, steps // 20)

    def show(row: dict[str, Any]) -> None:
        if not row:
            return
        for tracker in trackers:
            tracker.log(row)
        if row["split"] == "eval":
            weights = row.get("weights", "exact")
            form = "" if weights == "exact" else f" (frozen blocks in {weights})"
            notify(f"step {row['step']}: held-out loss {row['loss']:.4f}{form}")
        else:
            loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
            blocks = spans(row["active_blocks"])
            bar.update(row["step"] - bar.n)
            bar.set_postfix_str(
                f"loss {loss}, {row['tokens_per_s']:.0f} tok/s, {row['mem_bytes'] / 1e9:.2f} GB, blocks {blocks}"
            )
            if bar.disable and (row["step"] % stride == 0 or row["step"] == steps):
                notify(f"step {row['step']}/{steps}: loss {loss}, {row['tokens_per_s']:.0f} tokens/s, blocks {blocks}")

    return show

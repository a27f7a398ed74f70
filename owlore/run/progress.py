"""What a run says while it goes: a bar on a terminal, about twenty lines elsewhere; rows go to trackers too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from owlore.io.metrics import spans
from owlore.io.trackers import Tracker


def reporter(
    bar: Any, notify: Callable[[str], None], steps: int, trackers: Sequence[Tracker]
) -> Callable[[dict[str, Any]], None]:
    """A function that passes metrics rows to the trackers and shows them on the bar, or as lines without a terminal."""
    stride = max(1, steps // 20)

    def show(row: dict[str, Any]) -> None:
        for tracker in trackers if row else ():
            tracker.log(row)
        if row.get("split") == "eval":
            weights = row.get("weights", "exact")
            read = "" if weights == "exact" else f" (frozen blocks in {weights})"
            notify(f"step {row['step']}: held-out loss {row['loss']:.4f}{read}")
        elif row:
            loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
            blocks = spans(row["active_blocks"])
            bar.update(row["step"] - bar.n)
            bar.set_postfix_str(
                f"loss {loss}, {row['tokens_per_s']:.0f} tok/s, {row['mem_bytes'] / 1e9:.2f} GB, blocks {blocks}"
            )
            if bar.disable and (row["step"] % stride == 0 or row["step"] == steps):
                notify(f"step {row['step']}/{steps}: loss {loss}, {row['tokens_per_s']:.0f} tokens/s, blocks {blocks}")

    return show

"""Results as text for a terminal, and as JSON for a program."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pandas as pd

from htsr.report import cells, describe, model_name
from htsr.store import without_nan

if TYPE_CHECKING:
    from htsr.layer_table import LayerTable
    from htsr.scan_data import ScanData

SHOWN = ("block", "alpha", "alpha_hill", "lod", "stable_rank", "matrices", "parameters", "probability", "inclusion")


def scan_record(result: ScanData) -> dict[str, Any]:
    """The scan as one JSON object: provenance, blocks, the table, and how many tensors fared how."""
    return {
        **result.provenance,
        "tensors": {status: int(count) for status, count in result.frame["status"].value_counts().items()},
        "blocks": records(result.blocks),
        "table": result.default_table.to_dict() if result.default_table is not None else None,
    }


def render_scan(result: ScanData) -> str:
    """The findings in sentences, and the table of blocks."""
    further = [name for name in result.blocks if name.startswith("lod_tau")]
    blocks = result.blocks[[*SHOWN, *further]]
    shown = blocks.loc[:, blocks.notna().any()] if len(blocks) else blocks
    parts = [model_name(result), *describe(result)]
    return "\n".join(parts) + (f"\n\n{align(shown)}" if len(blocks) else "")


def render_table(made: LayerTable) -> str:
    """A layer table's rule and its rows."""
    settings = {key: value for key, value in made.rule.items() if value is not None and not isinstance(value, dict)}
    rule = ", ".join(f"{key} {value}" for key, value in settings.items())
    head = f"{made.model.get('id') or 'any model'}: rule {rule.removeprefix('name ')}, gamma {made.gamma}"
    return f"{head}\n\n{align(made.frame)}"


def render_comparison(a: ScanData, b: ScanData, matrices: pd.DataFrame) -> str:
    """Blocks of both scans side by side, then the matrices whose alpha moved most."""
    sides = [r.blocks.set_index("block")[["alpha", "lod", "stable_rank"]] for r in (a, b)]
    both = sides[0].add_suffix("_a").join(sides[1].add_suffix("_b"), how="outer")
    for name in ("alpha", "lod", "stable_rank"):
        both[f"{name}_diff"] = both[f"{name}_b"] - both[f"{name}_a"]
    known = both[sorted(both.columns)].dropna(axis="columns", how="all").reset_index()
    moved = matrices.reindex(matrices["alpha_diff"].abs().sort_values(ascending=False, kind="stable").index).head(8)
    moved = moved[moved["alpha_diff"].notna()][["tensor", "alpha_a", "alpha_b", "alpha_diff", "lod_diff"]]
    text = (
        f"a = {model_name(a)}, b = {model_name(b)}; {len(matrices)} matrices; by block\n\n{align(known)}"
        f"\n\nalpha moved most\n\n{align(moved)}"
    )
    if "overlap_rank" not in matrices:
        return text
    columns = ["tensor", "overlap_outputs", "overlap_inputs", "overlap_rank", "chance_outputs", "chance_inputs"]
    turned = matrices[matrices["overlap_rank"].notna()].sort_values("overlap_outputs", kind="stable").head(8)
    return f"{text}\n\nleading directions shared least (1 is all of them, chance what random ones share)\n\n" + align(
        turned[columns].astype({"overlap_rank": "Int64"})
    )


def render_verification(rows: pd.DataFrame) -> str:
    """Native and weightwatcher's alpha of every matrix, and the largest differences."""
    shown = rows[["tensor", "alpha", "ww_alpha", "alpha_difference", "n_tail", "ww_n_tail", "differ", "note"]]
    both = rows[rows["alpha_difference"].notna()]
    worst = both["alpha_difference"].max() if len(both) else float("nan")
    tails = int((both["n_tail"] == both["ww_n_tail"]).sum())
    summary = (
        f"{len(rows)} matrices, {len(both)} compared: equal n_tail in {tails}, "
        f"largest difference of alpha {worst:.2g}; "
        f"every column within its tolerance in {int(rows['agrees'].sum())}"
    )
    shown = shown.astype({"n_tail": "Int64", "ww_n_tail": "Int64"})
    return f"{align(shown)}\n\n{summary}"


def align(frame: pd.DataFrame) -> str:
    """A frame as aligned text: numbers to the right, words to the left."""
    rows = cells(frame)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = [not pd.api.types.is_numeric_dtype(frame[name]) for name in frame.columns]
    lines = [
        "  ".join(c.ljust(w) if word else c.rjust(w) for c, w, word in zip(row, widths, words, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame as JSON objects, null where nothing was computed."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def json_text(value: Any) -> str:
    """One JSON object; NaN becomes null."""
    return json.dumps(without_nan(value), allow_nan=False, default=str)

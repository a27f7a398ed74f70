"""report.html: one file that a phone can show and that loads nothing; and the notebook view of a scan."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from htsr.model.convergence import rank_correlation
from htsr.null_columns import NULL_COLUMNS
from htsr.taus import tau_column
from htsr.verdict import null_sentences

if TYPE_CHECKING:
    from jinja2 import Template

    from htsr.layer_table import LayerTable
    from htsr.scan_data import ScanData

CAPTIONS = {
    "alpha": "Each dot is a matrix, the line is the mean of a block. Between 2 and 6 is where trained layers of large "
    "models are usually found; below 2 the tail is very heavy, above 6 the spectrum hardly has one. Small matrices "
    "reach 2 to 6 by chance as well.",
    "lod": "Weights whose importance |W| x ||X|| is above tau times the mean of their block, in percent of the block's "
    "weights. A block with more outliers is drawn more often under rule lod.",
    "heatmap": "The exponent of every matrix by role. A row that differs from the others is a property of the role; a "
    "column, of the block.",
    "esd": "Spectra of the matrices with the heaviest, the middle and the lightest tail. The line is the fitted power "
    "law from xmin on; D is its distance from the data. The dark line, with --nulls, is noise of the same bulk.",
    "ks": "Three such matrices: how far the data lie from the best power law above every possible xmin. Every xmin in "
    "the band fits as well as the best, within 5 %; the alphas there are as good as the one reported.",
    "table": "The layer table: inclusion is the chance that a draw of gamma different blocks holds this one.",
}
MATRIX_COLUMNS = (
    "block", "role", "tensor", "rows", "cols", "alpha", "alpha_sigma", "ks_d", "n_tail", "alpha_hill", "stable_rank",
    "log10_norm", "lod", "status",
)  # fmt: skip
NULLS_SHOWN = ("alpha_low", "alpha_high", "alpha_least", "alpha_most", "p_gof", "num_spikes", "p_null")


def report_html(result: ScanData, pictures: Mapping[str, bytes]) -> str:
    """The report as one HTML page; `pictures` are PNGs by the name of their plot."""
    images = [{"name": name, "data": in_base64(png), "caption": CAPTIONS[name]} for name, png in pictures.items()]
    nulls = "p_null" in result.frame
    columns = MATRIX_COLUMNS + (NULLS_SHOWN if nulls else ())
    return _template().render(
        title=f"Scan of {model_name(result)}",
        images=images,
        sentences=describe(result),
        facts=facts(result),
        blocks=cells(result.blocks),
        matrices=cells(result.frame[result.frame["status"] != "skipped"], columns),
        meanings=NULL_COLUMNS if nulls else {},
        failed=cells(result.frame[result.frame["status"] == "failed"], ("tensor", "reason")),
        skipped=int((result.frame["status"] == "skipped").sum()),
    )


def in_base64(png: bytes) -> str:
    """A picture as the text that a data URL holds."""
    return base64.b64encode(png).decode()


def notebook_html(result: ScanData) -> str:
    """A summary, the pictures of alpha and LOD by depth, and the table of blocks, for a notebook's output cell."""
    from htsr.plots import Plots, picture

    plot = Plots(result)
    parts = [f"<h4>{escape(model_name(result))}</h4>", *(f"<p>{escape(s)}</p>" for s in describe(result))]
    for name in ("alpha", "lod"):
        if plot.has(name):
            data = in_base64(picture(getattr(plot, name)()))
            parts.append(f'<img alt="{name} by depth" style="max-width:48%" src="data:image/png;base64,{data}">')
    return "".join(parts) + _html_rows(result.blocks)


def table_html(table: LayerTable) -> str:
    """A layer table for a notebook's output cell: its model and rule, its bars, its rows."""
    from htsr.plots import new_axes, picture, table_bars

    rule, model = str(table.rule.get("name")), str(table.model.get("id") or "any model")
    data = in_base64(picture(table_bars(table, new_axes())))
    return (
        f"<h4>{escape(model)}: rule {escape(rule)}, gamma {table.gamma}</h4>"
        f'<img alt="layer table" style="max-width:60%" src="data:image/png;base64,{data}">' + _html_rows(table.frame)
    )


def _html_rows(frame: pd.DataFrame) -> str:
    columns, *rows = cells(frame)
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def model_name(result: ScanData) -> str:
    """The model as the user named it."""
    return str(result.provenance.get("model", {}).get("id") or "a model")


def describe(result: ScanData) -> list[str]:
    """What the numbers show, in a few sentences."""
    frame, blocks = result.frame, result.blocks
    counts = frame["status"].value_counts()
    sentences = [
        f"{counts.get('ok', 0)} matrices analysed, {counts.get('failed', 0)} failed, "
        f"{counts.get('skipped', 0)} tensors without a spectrum (vectors and the like), {len(blocks)} blocks."
    ]
    alpha = frame["alpha"].astype(float)
    if alpha.notna().any():
        inside = int(((alpha >= 2) & (alpha <= 6)).sum())
        sentences.append(
            f"The power-law exponent alpha has median {alpha.median():.2f} "
            f"(from {alpha.min():.2f} to {alpha.max():.2f}); {inside} of {alpha.notna().sum()} lie between 2 and 6."
        )
    sentences += null_sentences(frame)
    sentences += _extremes(blocks, "alpha", "lowest mean alpha (heaviest tails)", smallest=True)
    sentences += _extremes(blocks, "lod", "highest outlier share (LOD)", smallest=False)
    sentences += _outliers(result)
    if reason := result.provenance.get("lod_reason"):
        verb = "was not computed" if result.blocks["lod"].isna().all() else "lacks blocks"
        sentences.append(f"LOD {verb}: {reason}.")
    if result.default_table is not None and result.default_table.note:
        sentences.append(f"Layer table: {result.default_table.note}.")
    return sentences


def _outliers(result: ScanData) -> list[str]:
    """How LOD goes with alpha, with other limits, and between two halves of the text."""
    blocks, sentences = result.blocks, []
    lod = blocks["lod"].to_numpy(dtype=np.float64)
    if np.isfinite(rank := rank_correlation(blocks["alpha"].to_numpy(dtype=np.float64), lod)):
        sentences.append(f"Spearman correlation of alpha and LOD over the blocks: {rank:+.2f}.")
    calibration = result.provenance.get("calibration") or {}
    for tau in calibration.get("taus", [])[1:]:
        other = blocks[tau_column("lod", tau)].to_numpy(dtype=np.float64)
        if np.isfinite(rank := rank_correlation(lod, other)):
            sentences.append(
                f"LOD at tau {tau:g} orders the blocks as the table's does with a correlation of {rank:+.2f}."
            )
    halves = calibration.get("convergence")
    if halves and halves["block"] is not None and not result.provenance.get("lod_reason"):
        rank, (first, second) = halves["spearman"], halves["windows"]
        alike = "" if rank is None else f"rank correlation over the blocks {rank:+.3f}, "
        sentences.append(
            f"Convergence of LOD, the first {first} windows of the text against the other {second}: {alike}largest "
            f"difference {halves['largest_change']:.1%} of its LOD (block {halves['block']})."
        )
    return sentences


def facts(result: ScanData) -> list[tuple[str, str]]:
    """Where the numbers come from, as names and values."""
    record = result.provenance
    model, calibration = record.get("model", {}), record.get("calibration")
    rows: list[tuple[str, Any]] = [
        ("model", model.get("id")),
        ("revision", model.get("revision")),
        ("base", (record.get("base") or {}).get("id")),
        ("weights sha256", model.get("weights_sha256")),
        ("created", record.get("created")),
        ("engine", record.get("settings", {}).get("engine")),
        ("precision", record.get("settings", {}).get("precision")),
        ("calibration", calibration and _calibration_text(calibration)),
        ("seconds", ", ".join(f"{k} {v:.1f}" for k, v in record.get("seconds", {}).items())),
        ("peak memory", record.get("peak_bytes") and f"{record['peak_bytes'] / 1e9:.2f} GB"),
        ("versions", ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items() if v)),
    ]  # fmt: skip
    return [(name, str(value)) for name, value in rows if value]


def _calibration_text(calibration: Mapping[str, Any]) -> str:
    """A calibration in words; the records of earlier scans have one tau and no precision."""
    taus = ", ".join(f"{tau:g}" for tau in calibration.get("taus") or [calibration["tau"]])
    windows = f"{calibration['windows']} windows of {calibration['seq_len']} tokens"
    text = f"{calibration['source']}, {windows}, tau {taus}, {calibration['scope']} scope"
    precision = calibration.get("precision")
    return text + (f", run in {precision['dtype']} ({precision['why']})" if precision else "")


def cells(frame: pd.DataFrame, columns: tuple[str, ...] | None = None) -> list[list[str]]:
    """Header and rows of a frame as short text; nothing where there is no number."""
    frame = frame[list(columns)] if columns is not None else frame
    shown = [column_text(frame[name]) for name in frame.columns]
    return [list(map(str, frame.columns)), *map(list, zip(*shown, strict=True))]


def column_text(column: pd.Series) -> list[str]:
    """A column for reading: about four digits of its largest number, as many decimals in every row."""
    if pd.api.types.is_bool_dtype(column):
        return ["yes" if value else "no" for value in column]
    numbers = pd.to_numeric(column, errors="coerce") if pd.api.types.is_numeric_dtype(column) else None
    if numbers is None or numbers.notna().sum() == 0:
        return ["" if pd.isna(value) else str(value) for value in column]
    if pd.api.types.is_integer_dtype(column):
        return ["" if pd.isna(value) else f"{int(value):,}" for value in column]
    size = np.abs(numbers[numbers.notna() & (numbers != 0)].astype(float))
    if len(size) and (size.max() > 1e7 or size.max() < 1e-5):
        return ["" if pd.isna(value) else f"{value:.3g}" for value in numbers]
    decimals = max(0, 3 - int(np.floor(np.log10(size.max())))) if len(size) else 0
    return ["" if pd.isna(value) else f"{value:.{decimals}f}" for value in numbers]


def _extremes(blocks: pd.DataFrame, column: str, words: str, *, smallest: bool) -> list[str]:
    known = blocks[blocks[column].notna()].sort_values(column, ascending=smallest, kind="stable")
    if len(known) < 2:
        return []
    named = ", ".join(f"{int(b)} ({v:.3g})" for b, v in zip(known["block"][:3], known[column][:3], strict=True))
    return [f"Blocks with the {words}: {named}."]


@cache
def _template() -> Template:
    from importlib import resources

    from jinja2 import Environment

    text = resources.files("htsr").joinpath("assets/report.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)

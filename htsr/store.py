"""The files of a scan: every file appears complete or not at all, and is read back to the same numbers."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from htsr.errors import BadInput, NotFound
from htsr.files import check_output_directory, read_json, write_text
from htsr.null_columns import INTEGER_COLUMNS, TEXT_COLUMNS
from htsr.provenance import SCHEMA
from htsr.report import CAPTIONS, report_html
from htsr.scan_data import ScanData
from htsr.taus import LOD_COLUMNS, is_tau_column

INTEGERS = ("block", "rows", "cols", "n_tail", *INTEGER_COLUMNS)  # columns of whole numbers, empty where unknown
TEXT = ("role", "tensor", "dtype", "status", "reason", "part_of", *TEXT_COLUMNS)
NEEDED = ("alpha", "alpha_hill", "log10_norm", "stable_rank", "lod", "lod_weight")  # what blocks are made of
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell starts that a spreadsheet would run


def save_scan(result: ScanData, directory: Path, *, plots: bool = True) -> Path:
    """Write the files of a scan; pictures of an earlier one are removed when `plots` is off."""
    check_output_directory(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        (staging / "plots").mkdir(parents=True)
        _write(result, staging, plots=plots)
        _move(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def read_scan(directory: Path) -> ScanData:
    """The record of a scan in a directory that `save_scan` wrote; `htsr.load_scan` says what it raises."""
    if not directory.exists():
        raise NotFound(f"{directory}: no such directory; make it with `htsr scan MODEL --out {directory}`")
    if not (directory / "scan.csv").is_file():
        raise BadInput(f"{directory}: got no scan.csv in it, expected the directory that `htsr scan` wrote")
    provenance = read_json(directory / "scan.json", expected="a scan's record (scan.json)")
    if not isinstance(provenance, dict) or provenance.get("schema") != SCHEMA:
        got = provenance.get("schema") if isinstance(provenance, dict) else provenance
        raise BadInput(f"{directory / 'scan.json'}: got schema {got!r}, expected {SCHEMA!r}; scan again")
    return ScanData(
        frame=read_frame(directory / "scan.csv"),
        provenance=provenance,
        spectra=_read_spectra(directory / "spectra.npz"),
        block_lod=_read_block_lod(directory / "blocks.csv"),
    )


def _read_block_lod(path: Path) -> dict[int, dict[str, float]]:
    """The columns of LOD of each block in blocks.csv, to the last bit; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        columns = [name for name in frame.columns if name in LOD_COLUMNS or is_tau_column(name)]
        values = pd.DataFrame({name: _numbers(frame[name], integer=False) for name in columns})
        indexes = _numbers(frame["block"], integer=True)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a scan's blocks ({error}), expected the blocks.csv of `htsr scan`") from error
    rows = values.to_dict("records")
    return {int(index): row for index, row in zip(indexes, rows, strict=True)}


def read_frame(path: Path) -> pd.DataFrame:
    """scan.csv with the types it was written from."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        for name in frame.columns:
            frame[name] = frame[name].map(_plain) if name in TEXT else _numbers(frame[name], integer=name in INTEGERS)
        if missing := {*INTEGERS, *TEXT, *NEEDED} - {*frame.columns, "part_of", *INTEGER_COLUMNS, *TEXT_COLUMNS}:
            raise KeyError(f"no column {min(missing)}")
        return frame.astype({"rows": "int64", "cols": "int64"})
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a scan's table ({error}), expected the scan.csv of `htsr scan`") from error


def csv_text(frame: pd.DataFrame) -> str:
    """The text of a CSV file, with numbers at full precision and empty cells for what was not computed.

    Args:
        frame: the rows. Text in it that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    text = frame[[name for name in frame.columns if name in TEXT]]
    safe = {name: text[name].map(lambda c: f"'{c}" if str(c).startswith(FORMULA) else c) for name in text}
    return frame.assign(**safe).to_csv(index=False, lineterminator="\n")


def save_comparison(a: ScanData, b: ScanData, matrices: pd.DataFrame, directory: Path) -> None:
    """compare.csv and a PNG for every picture of two scans, written to `directory`."""
    from htsr.comparison_plots import comparison_pictures
    from htsr.plots import picture

    check_output_directory(directory)
    write_text(directory / "compare.csv", csv_text(matrices))
    for name, ax in comparison_pictures(a, b, matrices).items():
        (directory / f"{name}.png").write_bytes(picture(ax))


def _write(result: ScanData, staging: Path, *, plots: bool) -> None:
    start = time.perf_counter()
    drawn = {}
    if plots:
        from htsr.plots import pictures

        drawn = pictures(result)
    for name, png in drawn.items():
        (staging / "plots" / f"{name}.png").write_bytes(png)
    (staging / "scan.csv").write_text(csv_text(result.frame), encoding="utf-8", newline="\n")
    (staging / "blocks.csv").write_text(csv_text(result.blocks), encoding="utf-8", newline="\n")
    if result.default_table is not None:
        result.default_table.save(staging / "table.json")
    if result.spectra:
        _save_spectra(staging / "spectra.npz", result.spectra)
    (staging / "report.html").write_text(report_html(result, drawn), encoding="utf-8", newline="\n")
    record = dict(result.provenance)
    record["seconds"] = {**record.get("seconds", {}), "plots": time.perf_counter() - start}
    text = json.dumps(without_nan(record), indent=1, allow_nan=False, default=str)
    (staging / "scan.json").write_text(text + "\n", encoding="utf-8", newline="\n")


def _move(staging: Path, directory: Path) -> None:
    """Rename the new files into place and drop those of an earlier scan that have no successor."""
    (directory / "plots").mkdir(parents=True, exist_ok=True)
    optional = ["table.json", "spectra.npz", *(f"plots/{name}.png" for name in CAPTIONS)]
    for name in optional:
        if not (staging / name).exists():
            (directory / name).unlink(missing_ok=True)
    files = sorted(p.relative_to(staging) for p in staging.rglob("*") if p.is_file())
    for relative in files:
        (staging / relative).replace(directory / relative)
    if not any((directory / "plots").iterdir()):
        (directory / "plots").rmdir()


def _save_spectra(path: Path, spectra: Mapping[str, np.ndarray]) -> None:
    """One flat array and the length of each spectrum in it: a tensor may have any name, a zip member may not."""
    names, values = list(spectra), list(spectra.values())
    lengths = np.array([len(v) for v in values])
    np.savez_compressed(path, names=np.array(names, dtype=str), lengths=lengths, values=np.concatenate(values))


def _read_spectra(path: Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            parts = np.split(stored["values"], np.cumsum(stored["lengths"])[:-1])
            return dict(zip(stored["names"].tolist(), parts, strict=True))
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise BadInput(f"{path}: not readable ({error}), expected the spectra of a scan; scan again") from error


def _numbers(column: pd.Series, *, integer: bool) -> pd.Series:
    """A column of text as numbers, through Python's float, which reads back exactly what repr wrote."""
    values = pd.Series([float(cell) if cell else np.nan for cell in column], dtype="float64", index=column.index)
    return values.astype("Int64") if integer else values


def _plain(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell


def without_nan(value: Any) -> Any:
    """NaN and infinities as null: JSON has no other word for them."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value

"""The scan: every matrix of a model -> spectrum, fit and metrics; every block -> outliers; all of it -> a ScanResult.

open the source (headers only) -> views -> LOD (text through the blocks) -> spectra, the largest first -> frame
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.cache import Analyse, with_cache
from htsr.choices import ENGINES, PRECISIONS, SCOPES, check_choice
from htsr.console import notice, progress
from htsr.devices import pick_device
from htsr.errors import BadInput, UsageError
from htsr.files import cache_directory
from htsr.matrix_row import BASE_COLUMNS, COLUMNS, analyse, cost
from htsr.model.layers import LayerView, num_blocks, views
from htsr.model.magnitudes import weight_lod
from htsr.model.open import open_source
from htsr.model.source import Source
from htsr.provenance import SCHEMA, peak_bytes, spectra_record, versions
from htsr.taus import check_taus, further_columns
from htsr.workers import default_workers, run

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn

    from htsr.model.calibration import Calibration
    from htsr.result import ScanResult

GIGA = 1e9  # the progress bar counts in Gflop


def scan(
    model: str | Path | nn.Module | Mapping[str, torch.Tensor],
    *,
    out: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    engine: str = "native",
    calibration: str | Path | None = "builtin",
    tau: float | Sequence[float] = 13.0,
    lod_scope: str = "block",
    samples: int = 32,
    seq_len: int = 512,
    seed: int = 0,
    workers: int | None = None,
    nulls: bool = False,
    fresh: bool = False,
    allow_pickle: bool = False,
    revision: str | None = None,
    base: str | Path | nn.Module | Mapping[str, torch.Tensor] | None = None,
    plots: bool = True,
    quiet: bool = False,
    tokenizer: Any = None,
) -> ScanResult:
    """Read the spectra and the outliers of every layer of a model.

    The command line has the same options under the same names. No file is written without `out`.

    Args:
        model: `demo`, a directory, a .safetensors or .gguf file, a Hugging Face id, an nn.Module or a state dict.
        out: the directory that the result is saved to, None to save nothing.
        device: `auto`, `cpu` or `cuda[:N]`: where the calibration text runs. Spectra are computed on the CPU
            unless a CUDA device is named.
        precision: of the spectra. `auto`: fp64 up to a side of 1024, above it fp32 with a float64 tail where bounds
            measured on the matrix say that the fit is the same, else fp64; on a GPU whose float64 runs at full rate
            fp64 as far as its memory allows. `fp64`, `fp32`: throughout. The text runs in fp32; under `auto` in bf16
            where that is fast and shown to give the same LOD.
        engine: `native`, or `weightwatcher`, which fills the columns with its own numbers, one matrix at a time.
        calibration: text for LOD: `builtin`, a .txt or .jsonl file, None (or "none") for no LOD.
        tau: a weight is an outlier when its importance is above tau times the mean importance. Of several taus the
            first is the layer table's and the others have columns of their own (`lod_tau5`).
        lod_scope: the mean is taken over a `block` or over each `matrix`.
        samples: number of windows of calibration text, at least 1.
        seq_len: tokens in a window, at least 2; the model's maximum is used where it is smaller.
        seed: chooses the windows, and the random matrices of `nulls`.
        workers: threads that analyse matrices side by side; None uses every core that the process may use.
        nulls: adds the columns of `htsr.null_columns`: intervals, tests and comparisons with noise.
        fresh: computes every spectrum again, also those in the cache ($HTSR_CACHE, else the user's cache directory).
        allow_pickle: accepts pickled weights; they are unpickled with weights_only.
        revision: branch, tag or commit of a Hugging Face id.
        base: scan the difference to this model, tensor by tensor of the same name; for an adapter, this model with
            the adapter merged into it. The column `relative_change` is then ||W - W_base|| / ||W_base||.
        plots: saving to `out` draws plots.
        quiet: shows no progress bar and no notices.
        tokenizer: the tokenizer of a model that brings none, as an nn.Module does.

    Returns:
        The result: its numbers, its layer tables and its plots.

    Raises:
        UsageError: an option has a value that no scan can use.
        BadInput: the model or the text exists and cannot be used.
        NotFound: there is no such model or text.
    """
    taus = check_taus(tau)
    settings = {
        "device": device, "precision": precision, "engine": engine,
        "calibration": None if calibration is None else str(calibration), "tau": taus[0], "taus": list(taus),
        "lod_scope": lod_scope, "samples": samples, "seq_len": seq_len, "seed": seed, "nulls": nulls,
    }  # fmt: skip
    check_settings(settings)
    clock = Clock()
    source = open_source(model, revision=revision, allow_pickle=allow_pickle, base=base)
    layers = views(source)
    identity = {
        "id": source.id,
        "revision": source.revision,
        "num_blocks": num_blocks(source),
        "config_sha256": source.config_sha256(),
    }
    with in_background(source, workers):
        clock.lap("load")
        outliers, lod_reason = measure_outliers(source, settings, calibration, tokenizer, quiet)
        clock.lap("lod")
        work = analyser(engine, source, precision, device, fresh=fresh)
        rows, spectra = analyse_all(source, layers, work, workers, quiet)
    identity["weights_sha256"] = source.weights_sha256()  # `in_background` has found it by now
    clock.lap("alpha")
    alone = weight_lod(source, layers, taus, lod_scope, workers) if outliers is None else {}
    frame = assemble(rows, layers, outliers, alone, taus)
    if outliers is not None:
        lod_reason = blocks_without_lod(frame)
    clock.lap("lod")
    if nulls:
        from htsr.nulls import null_rows, with_nulls

        frame = with_nulls(frame, null_rows(source, layers, spectra, seed=seed, workers=workers, quiet=quiet))
        clock.lap("nulls")
    provenance = {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": identity,
        "base": None if source.base is None else {"id": source.base.id, "revision": source.base.revision},
        "settings": settings,
        "calibration": None if outliers is None else outliers.record(),
        "lod_reason": lod_reason,
        "versions": versions(*(["weightwatcher"] if engine == "weightwatcher" else [])),
        "spectra": spectra_record(rows.values()),
        "seconds": clock.seconds,
        "peak_bytes": peak_bytes(),
    }
    from htsr.result import ScanResult

    block_lod = {} if outliers is None else {index: block.columns for index, block in outliers.blocks.items()}
    result = ScanResult(frame=frame, provenance=provenance, spectra=spectra, block_lod=block_lod)
    if out is not None:
        result.save(out, plots=plots)
    return result


@contextlib.contextmanager
def in_background(source: Source, workers: int | None) -> Iterator[None]:
    """Hash the weights and import pandas, which the end of a scan needs, while the context is open.

    Args:
        source: the model. The tensors of an nn.Module are hashed before the context opens, since it is about to run.
        workers: threads of the scan; with one there is no background thread, and tensors are hashed as they are read.
    """
    if source.module is not None:
        source.weights_sha256()
    if source.module is not None or (default_workers() if workers is None else workers) < 2:
        yield
        return
    stop = threading.Event()

    def work() -> None:
        for tensor in source.tensors:
            if not stop.is_set():
                source.tensor_sha256(tensor.name)
        if not stop.is_set():
            importlib.import_module("pandas")

    with ThreadPoolExecutor(1) as background:
        done = background.submit(work)
        try:
            yield
            done.result()
        finally:
            stop.set()


class Clock:
    """Wall seconds by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("load", "alpha", "lod", "plots"), 0.0)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise UsageError for a value that no scan can use."""
    for name, known in (("precision", PRECISIONS), ("engine", ENGINES), ("lod_scope", SCOPES)):
        check_choice(name.replace("_", "-"), settings[name], known)
    for name, least in (("samples", 1), ("seq_len", 2)):
        if not isinstance(settings[name], int) or settings[name] < least:
            raise UsageError(f"{name.replace('_', '-')}: got {settings[name]!r}, expected a whole number >= {least}")


def analyser(engine: str, source: Source, precision: str, device: str, *, fresh: bool) -> Analyse:
    """The function that makes the row of a view, for an engine."""
    if engine == "native":
        on = {} if device in ("auto", "cpu") else {"device": pick_device(device)}
        work: Analyse = lambda view: analyse(source, view, precision, **on)  # noqa: E731
        return with_cache(work, source, cache_directory("htsr"), fresh=fresh, precision=precision, **on)
    from htsr.weightwatcher_engine import one_at_a_time

    return one_at_a_time(source)


def analyse_all(
    source: Source, layers: Sequence[LayerView], work: Analyse, workers: int | None, quiet: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Analyse the matrices, the largest first: tensor -> row and tensor -> eigenvalues."""
    rows: dict[str, dict[str, Any]] = {}
    spectra: dict[str, np.ndarray] = {}
    order = sorted(layers, key=lambda view: 0.0 if view.reason else -cost(view))
    total = sum(cost(view) for view in layers if not view.reason)
    done = run(work, order, lambda view: min(view.rows, view.cols), workers)
    with progress(round(total / GIGA, 3), "spectra", "Gflop", quiet=quiet) as bar:
        for view, (row, values) in done:
            rows[view.tensor] = row
            if values is not None:
                spectra[view.tensor] = values
            if not view.reason:
                bar.update(round(cost(view) / GIGA, 3))
    return rows, spectra


def measure_outliers(
    source: Source, settings: Mapping[str, Any], calibration: str | Path | None, tokenizer: Any, quiet: bool
) -> tuple[Calibration | None, str]:
    """Measure LOD, or return None and the reason why the model has none.

    Args:
        source: an open model. One that cannot run the text is an error only where the user named the text.
        settings: the scan's settings.
        calibration: the text, None or "none" for no LOD.
        tokenizer: the tokenizer of a model that brings none.
        quiet: shows no progress bar and no notice.
    """
    if calibration is None or str(calibration) == "none":
        return None, "no calibration was wanted"
    from htsr.model.calibration import calibrate

    try:
        with progress(num_blocks(source), "outliers", "block", quiet=quiet) as bar:
            return calibrate(
                source,
                calibration,
                tau=settings["taus"],
                scope=settings["lod_scope"],
                samples=settings["samples"],
                seq_len=settings["seq_len"],
                seed=settings["seed"],
                device=pick_device(settings["device"]),
                exact=settings["precision"] != "auto",
                tokenizer=tokenizer,
                progress=lambda count, _: bar.update(count - bar.n),
            ), ""
    except BadInput as error:
        if str(calibration) != "builtin":
            raise
        notice(f"no LOD: {error}", quiet=quiet)
        return None, str(error)


def blocks_without_lod(frame: pd.DataFrame) -> str:
    """Why a calibration left blocks without LOD; empty where it left none."""
    empty = frame[frame["block"].notna()].groupby("block")["lod"].agg(lambda lod: lod.isna().all())
    if not empty.any():
        return ""
    return f"what enters block {empty.idxmax()} is not finite; a weight there or before it holds NaN or infinity"


def assemble(
    rows: Mapping[str, dict[str, Any]],
    layers: Sequence[LayerView],
    outliers: Calibration | None,
    alone: Mapping[str, Mapping[str, float]],
    taus: Sequence[float],
) -> pd.DataFrame:
    """Put the rows in the order of the layers and add the outliers of each matrix.

    Args:
        rows: tensor -> row.
        layers: the matrices in order.
        outliers: the calibration; None where no text ran.
        alone: tensor -> columns of LOD that need no text, used where none ran.
        taus: the outlier limits.
    """
    import pandas as pd

    records = []
    for view in layers:
        row = dict(rows[view.tensor])
        if outliers is not None and view.block is not None and not view.reason:
            found = outliers.matrices.get((view.block, view.role))
            row |= found.columns if found else {}
        else:
            row |= alone.get(view.tensor, {})
        records.append(row)
    extra = [name for name in BASE_COLUMNS if any(name in row for row in records)]
    frame = pd.DataFrame.from_records(records, columns=[*COLUMNS, *extra, *further_columns(taus)])
    return frame.astype({"block": "Int64", "n_tail": "Int64"})

"""One cell of a study, in a process of its own: train, measure on rows that were never trained on, write one JSON."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from study import Cell, Rows

CURVE_DIGITS = 5


def run_cell(cell: Cell, *, model: str, rows: Rows, work: Path, out: Path, command: str, tasks: Any = None) -> None:
    """Run `cell` and write its result to `out`, whole or not at all; a failed run is a result, a stopped one is not.

    work: where the tables of the study lie (`<name>.json`, and `scan.json` with their cost). tasks: what `owlore eval`
    measures on the trained model besides, as {"names": [...], "limit": N, "data_dir": ...}, or None.
    """
    from htsr.errors import HtsrError, Interrupted

    result: dict[str, Any] = {
        "schema": "owlore-study-cell/1", "cell": cell.name, "arm": cell.arm, "method": cell.method, "lr": cell.lr,
        "seed": cell.seed, "table": cell.table, "command": command, "rows_sha256": rows.sha256, "commit": _commit(),
    }  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix="cell-") as place:
            result |= {"status": "finished", **_train_and_measure(cell, model, rows, work, Path(place), tasks)}
    except Interrupted:
        return
    except HtsrError as error:
        result |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, allow_nan=False) + "\n")
    temporary.replace(out)


def _train_and_measure(cell: Cell, model: str, rows: Rows, work: Path, place: Path, tasks: Any) -> dict[str, Any]:
    import torch

    import owlore

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    validation = place / "validation.json"
    validation.write_text(json.dumps(rows.validation))
    table: dict[str, Any] = {}
    scan_seconds = 0.0
    if cell.table is not None:
        table = {"table": str(work / f"{cell.table}.json")}
        scan_seconds = json.loads((work / "scan.json").read_text())["tables"][cell.table]["scan_cpu_seconds"]
    own = {"set": [f"{key}={value}" for key, value in cell.own.items()]} if cell.own else {}
    resident = _reset_peak()
    started, processor = time.perf_counter(), time.process_time()
    run = owlore.train(
        model, rows.train, method=cell.method, lr=cell.lr, seed=cell.seed, eval_data=str(validation),
        out=str(place / "run"), **cell.settings, **table, **own,
    )  # fmt: skip
    processor, wall = time.process_time() - processor, time.perf_counter() - started
    peak = _memory("VmHWM") - resident
    record = run.record
    train = [(row["step"], row["loss"]) for row in run.rows if row["split"] == "train"]
    return {
        "validation_loss": {"before": record["eval_loss_first"], "after": record["eval_loss_last"]},
        **_answers(run, rows.test, cell.settings.get("seq_len", 512)),
        "curve": [[step, round(loss, CURVE_DIGITS)] for step, loss in train],
        "evaluations": [[row["step"], row["loss"]] for row in run.rows if row["split"] == "eval"],
        "config": {k: v for k, v in record["config"].items() if k not in ("out", "eval_data", "data", "table", "model")}
        | {"model": Path(model).name},  # where it lay says nothing to others
        "draws": record.get("draws"),
        "inclusion": record.get("inclusion"),
        "tokens": record["tokens"],
        "steps": record["steps"],
        "trainable": record["trainable"],
        "seconds": {
            "call_cpu": processor, "call_wall": wall, "scan_cpu": scan_seconds,
            "steps_wall": record["tokens"] / record["tokens_per_s"], "median_step_wall": record["median_step_seconds"],
        },
        "peak_bytes": {
            "resident_above_start": peak,
            "state": record["peak_state_bytes"],
            "run": record["peak_bytes"],
            **({"device": record["peak_bytes"]} if record["device"].startswith("cuda") else {}),
        },
        "update_norms": update_norms(run.model, model),
        **({"tasks": _evaluate(run, place, tasks)} if tasks else {}),
        "device": record["device"],
        "machine": platform.machine(),
        "versions": record["versions"],
    }  # fmt: skip


def _answers(run: Any, rows: list[dict[str, Any]], seq_len: int) -> dict[str, Any]:
    """Loss a trained token on `rows`, and the share of them that greedy decoding answers word for word.

    Greedy decoding gives exactly the answer when each token of the answer, its end included, is the most probable one
    after the tokens before it; so one forward pass with the answer in place tells, and nothing has to be generated.
    """
    import torch
    import torch.nn.functional as F  # noqa: N812

    from owlore.data.batches import collate, length_batches
    from owlore.data.prepare import prepare

    encoded = prepare(rows, run.tokenizer, seq_len=seq_len).train
    losses, exact = [0.0] * len(rows), [False] * len(rows)
    tokens = [0] * len(rows)
    run.model.eval()
    device = next(run.model.parameters()).device
    for chosen in length_batches(encoded, 8):
        micro = collate(encoded, chosen).on(device)
        with torch.no_grad():
            logits = run.model(input_ids=micro["input_ids"]).logits[:, :-1].float()
        targets = micro["labels"][:, 1:]
        counted = targets != -100
        each = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
        right = (logits.argmax(-1) == targets) | ~counted
        for i, row in enumerate(chosen):
            losses[int(row)], exact[int(row)] = float(each[i].sum()), bool(right[i].all())
            tokens[int(row)] = int(counted[i].sum())
    return {
        "test_loss": sum(losses) / sum(tokens),
        "exact": sum(exact) / len(rows),
        "test_rows": [[round(losses[i] / max(1, tokens[i]), CURVE_DIGITS), int(exact[i])] for i in range(len(rows))],
    }  # fmt: skip


def update_norms(trained: Any, model: str) -> list[float]:
    """||W - W0|| / ||W0|| (Frobenius) of each block, adapters merged."""
    import torch

    from owlore.blocks import find_parts
    from owlore.models.loading import load

    final = trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else trained
    base = load(model, dtype="auto", attn="sdpa", device=torch.device("cpu")).model
    after = dict(final.named_parameters())
    norms = []
    parts = find_parts(base)
    for block in range(parts.num_blocks):
        change = size = 0.0
        for name, weight in parts.parameters([block], ()).items():
            before = weight.detach().double()
            change += float((after[name].detach().cpu().double() - before).square().sum())
            size += float(before.square().sum())
        norms.append((change / size) ** 0.5)
    return norms


def _evaluate(run: Any, place: Path, tasks: Any) -> dict[str, Any]:
    from owlore.evaluation import evaluate

    return evaluate(
        run.model, run.tokenizer, tasks["names"], limit=tasks.get("limit"), data_dir=tasks.get("data_dir"),
        shuffle=tasks.get("shuffle"),
    )["tasks"]  # fmt: skip


def _reset_peak() -> int:
    """PrepareContext the high-water mark of the resident set anew where Linux allows it; the bytes resident now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) * 1024


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"

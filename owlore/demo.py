"""`owlore demo`: all steps on the packaged model, in under two minutes: scan, table, fine-tuning, comparison."""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from htsr.console import notice
from htsr.errors import UsageError
from owlore.config import TrainConfig, find_config, load_yaml

if TYPE_CHECKING:
    from htsr import LayerTable
    from htsr.result import ScanResult
    from owlore.run.result import Run

MARKER = "demo.json"
HELD_OUT_EVERY = 5  # every fifth row is held out
ASKED = 24  # number of held-out questions that are answered before and after training
GAMMA = 3


def run_demo(out: Path, *, quiet: bool = False, json: bool = False) -> dict[str, Any]:
    """Scan the packaged model, fine-tune it by its layer table, compare it before and after, and print the comparison.

    Args:
        out: Directory of all files; an earlier demo in it is replaced.
        quiet: Whether to show neither progress nor notes.
        json: Whether to print one JSON object instead of text.

    Returns:
        The comparison.

    Raises:
        UsageError: `out` has other files.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are so small that more threads would be slower
    try:
        return _run_demo(out, quiet=quiet, as_json=json)
    finally:
        torch.set_num_threads(threads)


def _run_demo(out: Path, *, quiet: bool, as_json: bool) -> dict[str, Any]:
    import htsr

    started = time.perf_counter()
    _clear(out)
    train_file, heldout_file, heldout = _divide(out)
    notice("1/4 scanning the model", quiet=quiet)
    scan = htsr.scan("demo", out=out / "scan", quiet=quiet)
    table = scan.table(gamma=GAMMA)
    table.save(out / "table.json")
    notice("2/4 answering held-out questions with the model as it is", quiet=quiet)
    before = _answers("demo", heldout)
    notice("3/4 fine-tuning the blocks that the table draws", quiet=quiet)
    run = _fine_tune(out, train_file, heldout_file, quiet)
    notice("4/4 answering again, writing the report", quiet=quiet)
    after = _answers(run, heldout)
    result = _result(out, table, run, heldout, before, after, time.perf_counter() - started)
    shutil.copyfile(run.directory / "metrics.jsonl", out / "metrics.jsonl")
    (out / "report.html").write_text(_report(scan, table, run, result), encoding="utf-8")
    (out / MARKER).write_text(_json(result))
    click.echo(_json(result, indent=None) if as_json else _text(result, table))
    return result


def _json(value: Any, indent: int | None = 1) -> str:
    """JSON without NaN."""
    return json.dumps(value, indent=indent, allow_nan=False)


def _clear(out: Path) -> None:
    """Make an empty directory; only one that an earlier demo wrote is removed.

    Raises:
        UsageError: The directory has other files.
    """
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise UsageError(f"{out} is not empty and not an earlier demo: name another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("{}")  # marks the directory as a demo's, also if the demo is interrupted


def _divide(out: Path) -> tuple[Path, Path, list[dict[str, str]]]:
    """Write the packaged rows to a training file and a held-out file.

    Returns:
        The paths of both, and the held-out rows.
    """
    source = Path(__file__).parent / "assets" / "demo-data.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()
    parts = {
        "train": [line for i, line in enumerate(lines) if i % HELD_OUT_EVERY],
        "heldout": [line for i, line in enumerate(lines) if i % HELD_OUT_EVERY == 0],
    }
    for name, rows in parts.items():
        (out / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return out / "train.jsonl", out / "heldout.jsonl", [json.loads(line) for line in parts["heldout"]]


def _fine_tune(out: Path, train_file: Path, heldout_file: Path, quiet: bool) -> Run:
    from owlore.run.api import train_from_config

    recipe = find_config("demo")
    asked = {
        "data": str(train_file),
        "eval_data": str(heldout_file),
        "table": str(out / "table.json"),
        "active": GAMMA,
        "out": str(out / "run"),
        "quiet": quiet,
    }
    return train_from_config(TrainConfig.build(asked, file=load_yaml(recipe)))


def _answers(model: str | Run, rows: list[dict[str, str]]) -> list[str]:
    """Greedy answers of a model to the first held-out questions."""
    from owlore.data.examples import alpaca_prompt
    from owlore.generate import generate

    if isinstance(model, str):
        import torch

        from owlore.models.loading import load

        loaded = load(model, dtype="auto", attn="sdpa", device=torch.device("cpu"))
        network, tokenizer = loaded.model, loaded.tokenizer
    else:
        network, tokenizer = model.model, model.tokenizer
    prompts = [alpaca_prompt(row["instruction"], row.get("input", "")) for row in rows[:ASKED]]
    return [generate(network, tokenizer, prompt, max_new_tokens=32).strip() for prompt in prompts]


def _result(out: Path, table: LayerTable, run: Run, rows: list[dict[str, str]], before: list[str], after: list[str],
            seconds: float) -> dict[str, Any]:  # fmt: skip
    truth = [row["output"].strip() for row in rows[:ASKED]]
    record = run.record
    return {
        "rule": table.rule["name"],
        "heldout_loss": {"before": record["eval_loss_first"], "after": record["eval_loss_last"]},
        "right_answers": {
            "asked": len(truth),
            "before": sum(a == t for a, t in zip(before, truth, strict=True)),
            "after": sum(a == t for a, t in zip(after, truth, strict=True)),
        },
        "samples": [
            {"question": " ".join(filter(None, (row["instruction"], row.get("input")))), "expected": t,
             "before": b, "after": a}
            for row, t, b, a in zip(rows[:ASKED], truth, before, after, strict=True)
        ],
        "draws": record["draws"],
        "steps": record["steps"],
        "trainable": record["trainable"],
        "peak_bytes": record["peak_bytes"],
        "seconds": seconds,
        "directory": str(out),
    }  # fmt: skip


def _text(result: dict[str, Any], table: LayerTable) -> str:
    """The comparison as text."""
    loss, right = result["heldout_loss"], result["right_answers"]
    rows = zip(table.index, table.score, table.inclusion, result["draws"], strict=True)
    lines = [
        f"layer table (rule {result['rule']})",
        "block     score  inclusion  periods drawn",
        *(f"{block:>5} {score:>9.4f} {share:>10.3f} {drawn:>14}" for block, score, share, drawn in rows),
        "",
        f"{'':<22}{'before':>10}{'after':>10}",
        f"{'held-out loss':<22}{loss['before']:>10.3f}{loss['after']:>10.3f}",
        f"{'right answers':<22}{right['before']:>10}{right['after']:>10}   of {right['asked']}",
        "",
    ]
    chosen = next((s for s in result["samples"] if s["after"] == s["expected"]), result["samples"][0])
    lines += [
        f"question  {chosen['question']}",
        f"before    {_short(chosen['before'])}",
        f"after     {chosen['after']}",
    ]
    lines += [
        "",
        f"{result['steps']} steps, {result['trainable']:.0%} of the parameters trained in a step on average, "
        f"{result['seconds']:.0f} s in all",
        f"report    {result['directory']}/report.html",
        f"model     {result['directory']}/run/model",
    ]
    return "\n".join(lines)


def _short(text: str, width: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _report(scan: ScanResult, table: LayerTable, run: Run, result: dict[str, Any]) -> str:
    """report.html as text: a page that loads no other file."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    pictures = [
        ("Heavy tails by depth", scan.plot.alpha, "The power-law exponent of each block's spectra; lower is heavier."),
        ("Outliers by depth", scan.plot.lod, "Share of weights whose importance stands out; the table's score."),
        ("Layer table", lambda: scan.plot.table(table), "How often each block is expected to be drawn."),
        ("Loss", run.plot.loss, "Training loss a step, and the loss on rows that were never trained on."),
        ("Active blocks", run.plot.draws, "Blocks that were active at each step."),
        ("Draws", run.plot.draw_counts, "Periods in which each block was drawn, beside the number expected."),
    ]
    shown = [{"title": t, "data": _png(draw()), "caption": c} for t, draw, c in pictures]
    environment = Environment(loader=PackageLoader("owlore", "assets"), autoescape=select_autoescape(default=True))
    return environment.get_template("demo-report.html").render(result=result, pictures=shown)


def _png(axes: Any) -> str:
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="png", dpi=120)
    return base64.b64encode(buffer.getvalue()).decode()

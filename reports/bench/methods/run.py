"""All methods on one model with equal data and steps: seconds a step, peak bytes, trainable share, loss.

python reports/bench/methods/run.py MODEL_DIR ROWS.json [--methods owlore,lora] [--steps 6] [--threads 1] [--fresh]

Each method runs in a process of its own and leaves results/METHOD.json; what is there is not run again, so the bench
can be made in pieces. At the end the table of all that is there is printed, and written to results/table.txt.
Times are wall seconds, which mean something on a machine that does nothing else, and CPU seconds of the process.
Peak memory is the high-water mark of the resident set over the whole run above the resident set of the loaded model;
preparation (decompositions, SMT's warm-up) is inside, and its time is a column of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ALL = ("full", "galore", "owlore", "lisa", "lisa-d", "grass", "badam", "lora", "dora", "smt", "dota", "qdota")
EQUAL = {"batch": 2, "seq_len": 256, "packing": True, "dtype": "float32", "seed": 0, "schedule": "constant"}
PERIODS = {"every": 2}  # for the methods that draw: three draws in six steps
OWN: dict[str, dict[str, Any]] = {
    "full": {"lr": 5e-5},
    "galore": {"refresh": 200},
    "owlore": {"active": 2},
    "smt": {"set": {"warmup_batches": 4}},
}
KEYS = ("step_seconds", "step_cpu_seconds", "peak_bytes")
RATE = 3e-4  # untuned; full fine-tuning takes less


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--methods", default=",".join(ALL))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, help="layer table for owlore; uniform without")
    parser.add_argument("--fresh", action="store_true", help="run again what is there")
    parser.add_argument("--plan", action="store_true", help="run nothing; add what `owlore plan` says to the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args)))
        return
    RESULTS.mkdir(exist_ok=True)
    for method in () if args.plan else args.methods.split(","):
        file = RESULTS / f"{method}.json"
        if args.fresh or not file.exists():
            started = time.perf_counter()
            file.write_text(json.dumps(in_own_process(method), indent=1) + "\n")
            print(f"{method}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    for file in RESULTS.glob("*.json") if args.plan else ():
        result = json.loads(file.read_text())
        file.write_text(json.dumps(result | {"planned_bytes": planned(args.model, result)}, indent=1) + "\n")
    table = render([json.loads(path.read_text()) for path in RESULTS.glob("*.json")])
    (RESULTS / "table.txt").write_text(table + "\n")
    print(table)


def in_own_process(method: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_one(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    import owlore
    from owlore.models.loading import load
    from owlore.strategies import STRATEGIES
    from owlore.training.trainer import Trainer

    torch.set_num_threads(args.threads)
    method = args.one
    loaded = load(args.model, dtype="float32", attn="sdpa", device=torch.device("cpu"))
    rows = json.loads(args.rows.read_text())[:2000]
    changes = {"lr": RATE} | (PERIODS if "every" in STRATEGIES[method].accepted_options else {}) | OWN.get(method, {})
    table = "uniform" if args.table is None or method != "owlore" else args.table
    changes |= {"table": table} if STRATEGIES[method].table == "auto" else {}
    marks: list[float] = []  # CPU seconds when the loop begins, and before and after each step
    walls: list[float] = []  # of each step
    loop, advance = Trainer.run, Trainer.advance

    def marked_loop(self: Any, on_row: Any) -> None:
        marks.append(time.process_time())
        loop(self, on_row)

    def marked_step(self: Any) -> Any:
        before, clock = time.process_time(), time.perf_counter()
        row = advance(self)
        marks.extend((before, time.process_time()))
        walls.append(time.perf_counter() - clock)
        return row

    Trainer.run, Trainer.advance = marked_loop, marked_step
    started, at_load = time.process_time(), status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    with tempfile.TemporaryDirectory() as folder:
        run = owlore.train(loaded.model, rows, tokenizer=loaded.tokenizer, method=method, steps=args.steps,
                           eval_data=0.005, out=Path(folder) / "run", **EQUAL, **changes)  # fmt: skip
    record = run.record
    train = [row for row in run.rows if row["split"] == "train"]
    seconds = [after - before for before, after in zip(marks[1::2], marks[2::2], strict=True)]
    return {
        "method": method, "settings": {"steps": args.steps, "threads": args.threads, **EQUAL, **changes,
                                       "table": str(getattr(table, "name", table))},
        "step_seconds": sum(walls[1:]) / len(walls[1:]), "step_cpu_seconds": sum(seconds[1:]) / len(seconds[1:]),
        "steps_seconds": walls, "steps_cpu_seconds": seconds,
        "preparation_cpu_seconds": marks[0] - started, "wall_seconds": record["seconds"],
        "peak_bytes": status("VmHWM") - at_load, "state_bytes": record["peak_state_bytes"],
        "trainable": record["trainable"], "draws": record["draws"],
        "loss": [row["loss"] for row in train], "loss_before": record["eval_loss_first"],
        "loss_after": record["eval_loss_last"], "tokens": record["tokens"], "versions": record["versions"],
        "data_sha256": record["data"]["sha256"], "model": Path(args.model).name, "cores": os.cpu_count(),
    }  # fmt: skip


def planned(model: str, result: dict[str, Any]) -> int:
    """Bytes at the peak beside the weights of the model, by plan."""
    from owlore.config import TrainConfig
    from owlore.plan.planner import plan_from_config

    settings = {name: value for name, value in result["settings"].items() if name not in ("threads", "table")}
    config = TrainConfig.build({"model": model, "method": result["method"], **settings})
    full = TrainConfig.build({"model": model, "method": "full", **EQUAL, "steps": 1})
    weights = plan_from_config(full, lambda message: None).bytes["weights"]
    return plan_from_config(config, lambda message: None).bytes["total"] - weights


def render(results: list[dict[str, Any]]) -> str:
    """Aligned rows in the order of `ALL`, with ratios to full fine-tuning where that was run."""
    by_name = {result["method"]: result for result in results}
    full = by_name.get("full")
    lines = [
        f"{'method':<8} {'s/step':>7} {'x full':>7} {'CPU s':>7} {'x full':>7} {'peak MB':>8} {'x full':>7} "
        f"{'plan MB':>8} {'state MB':>9} {'trained':>8} {'prepare s':>9} {'before':>7} {'after':>7}"
    ]
    for name in ALL:
        if name not in by_name:
            continue
        got = by_name[name]
        ratios = [f"{got[key] / full[key]:.2f}" if full else "-" for key in KEYS]
        plan = f"{got['planned_bytes'] / 1e6:,.0f}" if "planned_bytes" in got else "-"
        prepare = got["preparation_cpu_seconds"]
        lines.append(
            f"{name:<8} {got['step_seconds']:>7.2f} {ratios[0]:>7} {got['step_cpu_seconds']:>7.2f} {ratios[1]:>7} "
            f"{got['peak_bytes'] / 1e6:>8,.0f} {ratios[2]:>7} "
            f"{plan:>8} {got['state_bytes'] / 1e6:>9,.1f} {got['trainable']:>8.2%} {prepare:>9.1f} "
            f"{got['loss_before']:>7.3f} {got['loss_after']:>7.3f}"
        )
    return "\n".join(lines)


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status (Linux)."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()

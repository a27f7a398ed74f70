"""Memory and speed on whatever CUDA device is there, in resumable parts; without one, a small shape on the CPU.

python reports/bench/gpu/bench.py [--out DIR] [--minutes 9] [--rows TEXT]... [--plan]

Rows that DIR/results.json has are not done again, and a part begins no row that its minutes may not hold: run the same
command until it says that all rows are done. Correctness comes first: the row `agree` compares losses and gradients
between residencies, and nothing else is measured before it holds. `--plan` prints what is planned and measures nothing.
Of each streamed row DIR/timelines/ shows a step: visits, copies and stalls by block.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rows import Row, gpu_rows, small_rows
from timeline import draw_timeline

HERE = Path(__file__).parent
RESERVE = 30  # seconds that a part keeps for writing down and leaving


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--rows", action="append", help="only the row of this name, or rows whose name holds this text")
    parser.add_argument("--plan", action="store_true", help="print the planned peaks and leave")
    parser.add_argument("--here", action="store_true", help="run rows in this process (for small shapes)")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = gpu_rows() if device.type == "cuda" or args.plan else small_rows()
    rows = chosen(rows, args.rows or [""])
    if args.plan:
        print(plan_table(rows))
        return 0
    if args.row:
        from measure import measure, prepare

        prepare()
        name = sys.stdin.readline().rstrip("\n")  # nothing where no row is left
        for row in rows:
            if row.name == name:
                print(json.dumps(measure(row, device)))
        return 0
    return run(args, rows, device)


def chosen(rows: list[Row], texts: list[str]) -> list[Row]:
    """`agree`, then what the texts ask for, in their order."""
    names = {row.name for row in rows}
    asked = [row for text in texts for row in rows if row.name == text or (text not in names and text in row.name)]
    return list(dict.fromkeys([row for row in rows if row.kind == "agree"] + asked))


def run(args: argparse.Namespace, rows: list[Row], device: Any) -> int:
    """Take rows until all are done or the minutes are over; 1 where the results do not agree."""
    with closing(Spare()) as spare:
        return take_rows(args, rows, device, spare)


def take_rows(args: argparse.Namespace, rows: list[Row], device: Any, spare: Spare) -> int:
    file = args.out / "results.json"
    done: dict[str, Any] = json.loads(file.read_text())["rows"] if file.is_file() else {}
    deadline = time.monotonic() + 60 * args.minutes - RESERVE
    for row in rows:
        if row.name in done:
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"{sum(r.name in done for r in rows)} of {len(rows)} rows are done; run the same command again")
            return 0
        began = time.monotonic()
        result = in_own_process(row, left, spare) if not args.here else _here(row, device)
        if result is None and began > deadline - 60 * args.minutes + RESERVE + 60:
            print(f"{row.name}: not in what was left of this part; run the same command again")
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        if spans := (result or {}).pop("timeline", None):
            draw_timeline(spans, row.name, machine(device)["device"], args.out / "timelines" / f"{slug(row.name)}.png")
        if row.kind == "agree" and result is None:
            print("agree: not in the time of a part; nothing is measured before it holds")
            return 1
        done[row.name] = {"row": asdict(row), **(result or {"skipped": f"took more than {args.minutes:g} minutes"})}
        file.write_text(json.dumps({"machine": machine(device), "rows": done}, indent=1) + "\n")
        print(f"{row.name}: {done[row.name].get('skipped') or done[row.name].get('failed') or 'done'}", flush=True)
        if row.kind == "agree" and "failed" in done[row.name]:
            return 1
    table = result_table(done)
    (args.out / "table.md").write_text(table + "\n")
    print(f"all {len(rows)} rows are done\n\n{table}")
    return 0


def _here(row: Row, device: Any) -> dict[str, Any]:
    from measure import measure

    return measure(row, device)


class Spare:
    """A process that has imported everything and waits to be told its row, while another one works on the last row."""

    def __init__(self) -> None:
        self._waiting: list[subprocess.Popen[str]] = []

    def take(self) -> subprocess.Popen[str]:
        """The one that waits; another one is started in its place."""
        process = self._waiting.pop() if self._waiting else _started()
        self._waiting.append(_started())
        return process

    def close(self) -> None:
        """End the one that waits."""
        for process in self._waiting:
            process.kill()
            process.communicate()


def _started() -> subprocess.Popen[str]:
    env = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TOKENIZERS_PARALLELISM": "false"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, __file__, "--row"], text=True, env=env, **pipes)


def in_own_process(row: Row, seconds: float, spare: Spare) -> dict[str, Any] | None:
    """The row's result; None where it did not end in time."""
    process = spare.take()
    try:
        found, said = process.communicate(row.name + "\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    if process.returncode:
        return {"failed": (said.strip().splitlines() or ["no word"])[-1]}
    return json.loads(found.splitlines()[-1])


def machine(device: Any) -> dict[str, Any]:
    import torch
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version()}  # fmt: skip


def result_table(done: dict[str, Any]) -> str:
    """Rows as a Markdown table; a dash is not measured."""
    head = (
        "| row | peak GiB | planned | wanted | tokens/s | at K = 50 | TFLOP/s | of a plain product | bus s | stall s |"
    )
    lines = [head, "|" + " --- |" * 10]
    for name, row in done.items():
        if "skipped" in row or "failed" in row:
            lines.append(f"| {name} | {row.get('skipped') or 'failed: ' + row['failed']} |" + " |" * 8)
            continue
        planned = row.get("planned_bytes", {}).get("total")
        cells = [gib(row.get("peak_bytes")), gib(planned), _number(row.get("wanted_gib"), ".1f"),
                 _number(row.get("tokens_per_s"), ",.0f"), _number(row.get("long_tokens_per_s"), ",.0f"),
                 _number(row.get("tflops"), ".3g"),
                 _number(row.get("mfu_of_product"), ".0%"), _number(row.get("bus_seconds"), ".3f"),
                 _number(row.get("stall_seconds"), ".3f")]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plan_table(rows: list[Row]) -> str:
    """Planned peaks beside the wanted ones."""
    from measure import planned

    lines = ["| row | planned GiB | wanted | host GiB | copies hidden from tokens |", "|" + " --- |" * 5]
    for row in rows:
        if row.kind == "ours":
            plan = planned(row)
            host = sum((plan.host or {}).get(kind, 0) for kind in ("store", "embedding", "boundaries"))
            hidden = f"{plan.traffic.hidden_from:,}" if plan.traffic.loads else "-"
            wanted = _number(row.wanted_gib, ".1f")
            lines.append(f"| {row.name} | {gib(plan.bytes['total'])} | {wanted} | {gib(host or None)} | {hidden} |")
    return "\n".join(lines)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9+]+", "-", name.lower()).strip("-")


def gib(size: float | None) -> str:
    return _number(None if size is None else size / 2**30, ".3g")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    raise SystemExit(main())

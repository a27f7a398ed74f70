"""Run the matrix of a study, each cell a process of its own: the sweep first, then the seeds at the chosen rates.

    python reports/studies/methods/run.py reports/studies/methods/demo.yaml [--workers 2] [--max-cells N]

Cells whose JSON exists are skipped, so a stopped matrix goes on where it was; the command is given again until nothing
is missing (--list), since an arm's seeds follow from its sweep. `report.py` makes table, plots and page from the JSON
alone; --page has it done at the end. Model and data that a YAML file names are looked for below --models and --data.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import report
from analyse import choose, chosen, read_results
from study import Cell, Rows, Study, divide, read_study, scan_tables, without_tables

PRELOADED = ["torch", "transformers", "owlore.run.api", "cell"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--models", type=Path, default=Path(), help="where a model's folder lies")
    parser.add_argument("--data", type=Path, default=Path(), help="where data files lie")
    parser.add_argument("--work", type=Path, help="tables and scan [default: <study>/tables]")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-cells", type=int, help="stop after so many new cells")
    parser.add_argument("--only", help="cells whose name begins so")
    parser.add_argument("--page", action="store_true", help="write table, plots and page at the end")
    parser.add_argument("--list", action="store_true", help="say which cells are missing, and run none")
    args = parser.parse_args()
    study = read_study(args.study)
    results = study.directory / "results"
    results.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in due(study, results) if cell.name.startswith(args.only or "")]
    if args.list:
        print("\n".join(cell.name for cell in missing))
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(study.spec.get("threads", 1)))
    model = find_model(study, args.models)
    rows, others = load_rows(study, args.data)
    divided = divide(rows, study.spec["data"], others)
    work = args.work or study.directory / "tables"
    make_tables(study, model, divided, work)
    available = methods_at_hand()
    todo = [cell for cell in missing if cell.method in available]
    if left := sorted({cell.method for cell in missing} - available):
        print(f"not in this version of owlore, left for later: {', '.join(left)}")
    run_all(todo[: args.max_cells], study, model, divided, work, results, args)
    if args.page:
        report.write(study)


def due(study: Study, results: Path) -> list[Cell]:
    """Cells without a result that can be run now: the sweep, and the reported seeds of arms that were swept.

    All of a stage come before any of the next.
    """
    have = read_results(results)
    rates = {arm: chosen(losses, study.learning_rates)
             for arm, losses in choose(have, study.learning_rates, study.tuning_seed).items()}  # fmt: skip
    cells = study.sweep() + study.reported({arm: lr for arm, lr in rates.items() if lr is not None})
    open_ = [cell for cell in cells if not (results / f"{cell.name}.json").exists()]
    return sorted(open_, key=lambda cell: study.arms[cell.arm].get("stage", 1))


def run_all(
    cells: list[Cell], study: Study, model: str, rows: Rows, work: Path, results: Path, args: argparse.Namespace
) -> None:
    """Cells in order, `workers` at a time. Each is forked from a server that has imported everything and done nothing,
    which spares a cell five seconds of imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    running: list[Any] = []
    for number, cell in enumerate(cells, 1):
        while len(running) >= args.workers:
            running = waited(running)
        command = f"python reports/studies/methods/run.py {study.path.name} --only {cell.name}"
        process = context.Process(
            target=work_on, args=(cell, model, rows, work, results, command, eval_of(study, args))
        )
        process.start()
        running.append(process)
        print(f"{number}/{len(cells)} {cell.name}", flush=True)
    while running:
        running = waited(running)


def work_on(cell: Cell, model: str, rows: Rows, work: Path, results: Path, command: str, tasks: Any) -> None:
    from cell import run_cell

    run_cell(cell, model=model, rows=rows, work=work, out=results / f"{cell.name}.json", command=command, tasks=tasks)


def waited(running: list[Any]) -> list[Any]:
    """Those that still run, after a while; one that died without a result is said aloud and tried again next time."""
    time.sleep(0.2)
    for process in running:
        if process.exitcode:
            print(f"a cell ended with code {process.exitcode} and left no result", file=sys.stderr, flush=True)
    return [process for process in running if process.exitcode is None]


def find_model(study: Study, models: Path) -> str:
    """The model of the study: `demo`, or a folder below `models`."""
    name = study.spec["model"]
    return name if name == "demo" else str(models / name)


def load_rows(study: Study, data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the study, and those of test sets that it will be asked about."""
    from owlore.data.files import locate_data, read_file

    spec = study.spec["data"]
    source = spec["source"]
    path = locate_data(source if source == "demo-data" else data / source)
    others: list[dict[str, Any]] = []
    for name in spec.get("apart_from", ()):
        others += read_file(data / name)[0]
    return read_file(path)[0], others


def make_tables(study: Study, model: str, rows: Rows, work: Path) -> None:
    """Scan once and keep the tables, what they cost, and how the rows were divided."""
    work.mkdir(parents=True, exist_ok=True)
    if (work / "scan.json").exists():
        return
    reads = any("table" in arm for arm in study.arms.values())
    tables, facts = scan_tables(model, study.spec["settings"]["active"]) if reads else ({}, without_tables(model))
    for name, table in tables.items():
        table.save(work / f"{name}.json")
    parts = {"train": len(rows.train), "validation": len(rows.validation), "test": len(rows.test)}
    facts["rows"] = {**parts, "removed_as_asked_later": rows.removed, "sha256": rows.sha256}
    (work / "scan.json").write_text(json.dumps(facts, indent=1) + "\n")


def methods_at_hand() -> Iterable[str]:
    from owlore.choices import METHODS

    return set(METHODS)


def eval_of(study: Study, args: argparse.Namespace) -> dict[str, Any] | None:
    tasks = study.spec.get("tasks")
    return None if not tasks else {**tasks, "data_dir": str(args.data)}


if __name__ == "__main__":
    main()

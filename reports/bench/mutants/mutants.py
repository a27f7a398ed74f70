"""Would the tests notice? One line of the code is changed at a time and the tests that run this line are run.

python reports/bench/mutants/mutants.py cover --work DIR [--tree CHECKOUT] [TESTS...]
python reports/bench/mutants/mutants.py run --work DIR --out FILE.jsonl --seed 1 --count 160
python reports/bench/mutants/mutants.py report FILE.jsonl [LATER.jsonl]

`cover` copies the checkout to DIR/tree, runs the tests there once and writes down which test runs which line; `run`
changes only further copies, one for each of its `--processes`. Both go on where a broken-off run stopped. Needs the
package `coverage`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

from changes import Change, changes_of
from recorder import options

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[3]
AREAS = {  # both layouts: what lay in owlore/train lies in several packages now
    "numerics": ["htsr/numerics/*.py"],
    "kernels": ["owlore/kernels/*.py", "owlore/patches.py"],
    "optim": ["owlore/optim/*.py"],
    "sampling": ["owlore/sampling.py", "htsr/probability.py"],
    "training": ["owlore/train/*.py", "owlore/settings.py", "owlore/layer_table.py",
                 *(f"owlore/{name}/*.py" for name in ("training", "activations", "io", "models", "plan", "run"))],
    "residency": ["owlore/residency/*.py"],
}  # fmt: skip
CONTROLS = 6  # runs without a change, which must not fail: a test that fails by itself would look like a catch
MEMORY = 16 << 30  # bytes of address space that a run may take


def files_of(area: str, tree: Path) -> list[Path]:
    """The files of an area that this tree has, in a fixed order."""
    return sorted({path for pattern in AREAS[area] for path in tree.glob(pattern)})


def copy_tree(source: Path, target: Path) -> None:
    """A fresh copy of a checkout without caches; the tests look for models in `shared` beside it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    shared, link = source.parent / "shared", target.parent / "shared"
    if shared.exists() and not link.exists():
        link.symlink_to(shared.resolve())


def environment(tree: Path, temporary: str) -> dict[str, str]:
    """No byte code: a change within one second and of one length would not be seen."""
    own = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": temporary, "HF_HUB_OFFLINE": "1"}
    return {**os.environ, "OMP_NUM_THREADS": "1", **own}


def cover(work: Path, tree: Path, tests: list[str]) -> None:
    """Copies the tree and lets a child process record it; a broken-off record of the same copy goes on."""
    done = work / "cover.json"
    if done.exists() or not (work / "tests.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        for name in ("cover.json", "tests.json", "lines.sqlite"):
            (work / name).unlink(missing_ok=True)
        copy_tree(tree, work / "tree")
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        recorder = str(Path(__file__).resolve().with_name("recorder.py"))
        command = [sys.executable, recorder, str(done), *tests]
        subprocess.run(command, cwd=work / "tree", env=environment(work / "tree", temporary), check=True)


def choose(work: Path, seed: int, count: int, areas: list[str]) -> list[tuple[str, str, Change, str]]:
    """(key, file, change, area) of the changes with the lowest hashes, one a line, equally many of every area.

    The hash is of what the change says, so unchanged code gets the same changes wherever it lies.
    """
    lines, chosen = json.loads((work / "cover.json").read_text())["lines"], []
    for number, area in enumerate(areas):
        ranked = []
        for path in files_of(area, work / "tree"):
            name, source = str(path.relative_to(work / "tree")), path.read_text()
            run = lines.get(name, {})
            ranked += [(hashlib.sha256(f"{seed} {c.key}".encode()).hexdigest(), name, c)
                       for c in changes_of(source) if str(c.line) in run]  # fmt: skip
        taken: set[tuple[str, int]] = set()
        wanted = count // len(areas) + (number < count % len(areas))
        for rank, name, c in sorted(ranked, key=lambda r: r[:2]):
            if len(taken) < wanted and (name, c.line) not in taken:
                taken.add((name, c.line))
                chosen.append((rank, name, c, area))
    return [(c.key, name, c, area) for _, name, c, area in sorted(chosen, key=lambda r: r[:2])]


def tests_for(covered: dict[str, Any], name: str, line: int, most: int, seconds: float) -> tuple[list[str], float, int]:
    """Tests of a line: the fastest of every test file first, then the second of every file; their cost; all there are.

    Tests of one file are often alike, so fastest first alone would ask one file again and again.
    """
    of_file: Counter[str] = Counter()
    ranked, chosen, total = [], [], 0.0
    for i in sorted(covered["lines"][name][str(line)], key=lambda i: (covered["seconds"][i], i)):
        file = covered["tests"][i].split("::")[0]
        ranked.append((of_file[file], covered["seconds"][i], i))
        of_file[file] += 1
    for _, cost, i in sorted(ranked):
        if len(chosen) < most and (not chosen or total + cost <= seconds):
            chosen.append(covered["tests"][i])
            total += cost
    return chosen, total, len(ranked)


def try_change(work: Path, tree: Path, name: str, change: Change | None, tests: list[str], limit: float) -> Row:
    """Writes a change into the copy `tree`, runs the tests until one fails, and puts the file back."""
    path, source = tree / name, (work / "tree" / name).read_text()
    path.write_text(source if change is None else change.apply(source))
    command = [sys.executable, "-m", "pytest", "-x", *options(), *tests]
    began, rc, output = time.monotonic(), None, ""
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        child = subprocess.Popen(
            command, cwd=tree, env=environment(tree, temporary), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        )  # fmt: skip
        try:
            output, _ = child.communicate(timeout=limit)
            rc = child.returncode
        except subprocess.TimeoutExpired:
            pass
        finally:
            if rc is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
            path.write_text(source)
            shutil.rmtree(tree / ".hypothesis", ignore_errors=True)
    by = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    outcome = {None: "timeout", 0: "survived"}.get(rc, "caught")
    return {"outcome": outcome, "by": by and by[1], "rc": rc, "seconds": round(time.monotonic() - began, 1)}


def read(path: Path) -> dict[str, Row]:
    """The last row of every key."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["key"]: row for row in rows}


def run(args: argparse.Namespace, work: Path) -> None:
    """Tries the changes that `out` has not; with `again`, survivors that not every test of their line has seen."""
    covered, done = json.loads((work / "cover.json").read_text()), read(args.out)
    todo: list[tuple[str, str, Change, str | None]] = list(choose(work, args.seed, args.count, args.areas))
    step = max(1, len(todo) // CONTROLS)
    for i, (key, name, change, _) in list(enumerate(todo))[::step][::-1]:
        todo.insert(i, (f"control {key}", name, change, None))
    trees: SimpleQueue[Path] = SimpleQueue()
    for number in range(args.processes):
        copy_tree(work / "tree", work / f"changed-{number}")
        trees.put(work / f"changed-{number}")
    writing = Lock()

    def attempt(i: int, key: str, name: str, change: Change, area: str | None) -> None:
        row = done.get(key)
        if (row is None) == args.again or (args.again and (row["outcome"] != "survived" or row["ran"] == row["of"])):
            return
        tests, cost, number = tests_for(covered, name, change.line, args.most, args.seconds)
        text = (work / "tree" / name).read_text().split("\n")[change.line - 1].strip()
        row = {"key": key, "area": area or "control", "file": name, "line": change.line, "function": change.function}
        if area:
            row |= {"operator": change.operator, "before": change.before, "after": change.after, "text": text}
        row |= {"ran": len(tests), "of": number}
        tree = trees.get()
        try:
            row |= try_change(work, tree, name, change if area else None, tests, 120 + 4 * args.processes * cost)
        finally:
            trees.put(tree)
        with writing, args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
            print(f"{i}/{len(todo)} {row['outcome']} {name}:{change.line} {row['seconds']} s", flush=True)

    with ThreadPoolExecutor(args.processes) as pool:
        for future in [pool.submit(attempt, i, *one) for i, one in enumerate(todo, 1)]:
            future.result()


def report(paths: list[Path]) -> str:
    """Shares caught by area, survivors, and with two files what became of the changes that both have."""
    text, runs = [], [read(path) for path in paths]
    for path, rows in zip(paths, runs, strict=True):
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows.values():
            for area in {row["area"], *(["all"] if row["area"] != "control" else [])}:
                counts[area][row["outcome"]] += 1
        text.append(f"{path.name}: {sum(row['seconds'] for row in rows.values()) / len(rows):.0f} s a change")
        for area in [*AREAS, "all", "control"]:
            n, survived = sum(counts[area].values()), counts[area]["survived"]
            share = f", {1 - survived / n:.1%}" if n else ""
            text.append(f"  {area:10} {n:4} changes, {n - survived:4} caught{share}")
        for row in sorted(rows.values(), key=lambda r: (r["file"], r["line"])):
            if row["outcome"] == "survived" and row["area"] != "control":
                place = f"{row['file']}:{row['line']} {row['function']}"
                text.append(f"  survived ({row['ran']} of {row['of']} tests) {place}")
                text.append(f"    {row['operator']}: {row['before']} -> {row['after']}   in   {row['text']}")
    if len(runs) == 2:
        both = [(runs[0][k], runs[1][k]) for k in runs[0].keys() & runs[1].keys() if not k.startswith("control")]
        caught = [sum(row["outcome"] != "survived" for row in side) for side in zip(*both, strict=True)]
        text.append(f"of {len(both)} changes in both, caught before and after: {caught}")
        for old, new in both:
            if old["outcome"] != "survived" and new["outcome"] == "survived":
                text.append(f"  no longer caught: {new['file']}:{new['line']}, before by {old['by']}")
    return "\n".join(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("cover")
    sub.add_argument("--work", type=Path, required=True)
    sub.add_argument("--tree", type=Path, default=ROOT, help="the checkout to look at (this one)")
    sub.add_argument("tests", nargs="*", default=["tests/htsr", "tests/owlore"])
    sub = commands.add_parser("run")
    sub.add_argument("--work", type=Path, required=True)
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--seed", type=int, default=1)
    sub.add_argument("--count", type=int, default=160)
    sub.add_argument("--areas", nargs="+", choices=AREAS, default=list(AREAS))
    sub.add_argument("--most", type=int, default=40, help="tests a change at most")
    sub.add_argument("--seconds", type=float, default=60.0, help="seconds of tests a change at most")
    sub.add_argument("--processes", type=int, default=1, help="changes that are tried at once")
    sub.add_argument("--again", action="store_true", help="only survivors that not every test of their line has seen")
    commands.add_parser("report").add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "cover":
        cover(args.work.resolve(), args.tree.resolve(), args.tests)
    elif args.command == "report":
        print(report(args.files))
    else:
        run(args, args.work.resolve())


if __name__ == "__main__":
    main()

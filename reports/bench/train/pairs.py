"""Processor seconds of our arms in two checkouts, step by step in turn: is a step as fast as it was?

python reports/bench/train/pairs.py EARLIER_CHECKOUT MODEL_DIR [--arms full,owlore-2] [--pairs 9] [--out FILE.json]

Each checkout trains the arm in a process of its own; while one takes a step the other waits, and who begins alternates.
A pair is what one draw takes in both: the step that draws and finds the bases, and the one after it (two steps of an
arm that draws nothing). Printed: the median ratio now / earlier and a 95 % interval for it from the order statistics of
the pairs (the sign test). That both compute the same is what `reports/bench/same_bits/` shows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHILD = """
import argparse, sys, warnings
sys.path.insert(0, ".")
import measure, ours
warnings.simplefilter("ignore")
begin, end = measure.Clock.start, measure.Clock.stop
def start(clock):
    print("ready", flush=True)
    sys.stdin.readline()
    begin(clock)
def stop(clock):
    end(clock)
    print(clock.cpu[-1], flush=True)
measure.Clock.start, measure.Clock.stop = start, stop
args = argparse.Namespace(model=sys.argv[1], batch=int(sys.argv[3]), tokens=int(sys.argv[4]), threads=1, lr=1e-4)
model = measure.loaded(args)
ours.imports()
ours.run(args, sys.argv[2], model, 10 ** 6)
"""


class Side:
    """A checkout that takes one step of an arm whenever it is asked to."""

    def __init__(self, tree: Path, args: argparse.Namespace, arm: str) -> None:
        command = [sys.executable, "-c", CHILD, args.model, arm, str(args.batch), str(args.tokens)]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            command, cwd=tree / "reports/bench/train", env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._read("ready")

    def _read(self, expected: str | None = None) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline().strip()
        if not line or (expected is not None and line != expected):
            raise SystemExit(f"a step failed: got {line!r}")
        return line

    def step(self) -> float:
        """Processor seconds of one step."""
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        seconds = float(self._read())
        self._read("ready")
        return seconds

    def close(self) -> None:
        self._child.kill()
        self._child.wait()


def compare(earlier: Path, args: argparse.Namespace, arm: str) -> list[float]:
    """Ratios now / earlier, one a pair."""
    sides = [Side(HERE.parents[2], args, arm), Side(earlier, args, arm)]
    try:
        for side in sides:
            side.step()  # warm-up
        ratios = []
        for pair in range(args.pairs):
            seconds = [0.0, 0.0]
            for _ in range(2):
                for which in (0, 1) if pair % 2 else (1, 0):
                    seconds[which] += sides[which].step()
            ratios.append(seconds[0] / seconds[1])
        return ratios
    finally:
        for side in sides:
            side.close()


def interval(ratios: list[float]) -> tuple[float, float]:
    """The order statistics that hold the median with a probability of at least 95 %."""
    n, ordered = len(ratios), sorted(ratios)
    k = max((k for k in range(1, n // 2 + 1) if sum(math.comb(n, i) for i in range(k)) / 2**n <= 0.025), default=1)
    return ordered[k - 1], ordered[n - k]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("earlier", type=Path)
    parser.add_argument("model")
    parser.add_argument("--arms", default="full,owlore-2,owlore-2+ckpt,owlore-1,galore,lisa-2")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {}
    for arm in args.arms.split(","):
        ratios = compare(args.earlier.resolve(), args, arm)
        low, high = interval(ratios)
        found[arm] = {"median": statistics.median(ratios), "interval": [low, high], "ratios": ratios}
        print(f"{arm:<15} {found[arm]['median']:.4f}  [{low:.4f}, {high:.4f}]", flush=True)
    if args.out:
        settings = {"model": Path(args.model).name, "batch": args.batch, "tokens": args.tokens, "threads": 1}
        args.out.write_text(json.dumps({"settings": settings, "machine": platform.machine(), "arms": found}) + "\n")


if __name__ == "__main__":
    main()

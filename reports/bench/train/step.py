"""Step time and peak memory of training methods on one model, each in a process of its own; ratios to `full`.

python reports/bench/train/step.py MODEL_DIR [--arms full,owlore-2 ...] [--out FILE.json] [--through COMMAND]

With --out, arms are added to what the file holds. --through puts a command (nice, taskset ...) before each arm's own.
Peak memory is the high-water mark of the resident set over the whole arm, warm-up included, above the resident set of
the loaded model. Each draw is trained for two steps: the first, which finds the bases, counts a fiftieth, as in a real
period, the second the rest (`first_cpu_seconds` in the file has the first ones). Processor seconds beside wall seconds:
other work on the machine moves them less.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import ours
import peers
from measure import loaded, peak, reset_peak, resident

ARMS = ours.ARMS | peers.ARMS
COMMON = slice(4, 6)  # steps 5 and 6, which every arm does on the same batches: their mean loss is printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="of the arms that draw nothing")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--through", default="")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args)))
        return
    in_own_process(args, "check")  # correctness first
    known = json.loads(args.out.read_text())["arms"] if args.out and args.out.exists() else {}
    for arm in filter(None, args.arms.split(",")):
        known[arm] = in_own_process(args, arm)
        print(f"{arm}: {known[arm]['mean_seconds']:.2f} s, {known[arm]['peak_bytes'] / 1e6:.0f} MB", file=sys.stderr)
        if args.out:
            found = {name: known[name] for name in ARMS if name in known}
            args.out.write_text(json.dumps({"settings": settings(args), "arms": found}, indent=1) + "\n")
    print(table({name: known[name] for name in ARMS if name in known}))


def table(arms: dict[str, dict[str, Any]]) -> str:
    base = arms.get("full", next(iter(arms.values())))
    heads = ("s/step", "x full", "cpu s", "x full", "peak MB", "x full", "depth", "loss")
    lines = [f"{'arm':<15}" + "".join(f" {head:>7}" for head in heads) + "  what"]
    for name, got in arms.items():
        depth = f"{got['mean_depth']:.2f}" if "mean_depth" in got else ""
        ratios = (got[kind] / base[kind] for kind in ("mean_seconds", "mean_cpu_seconds", "peak_bytes"))
        time, cpu, memory = (f"{ratio:.2f}" for ratio in ratios)
        cells = (
            f"{got['mean_seconds']:.3f}", time, f"{got['mean_cpu_seconds']:.2f}", cpu,
            f"{got['peak_bytes'] / 1e6:.0f}", memory, depth, f"{statistics.mean(got['losses'][COMMON]):.4f}",
        )  # fmt: skip
        lines.append(f"{name:<15}" + "".join(f" {cell:>7}" for cell in cells) + f"  {ARMS[name]}")
    return "\n".join(lines)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "model": Path(args.model).name, "batch": args.batch, "tokens": args.tokens, "threads": args.threads,
        "steps": args.steps, "lr": args.lr, "machine": platform.machine(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


def in_own_process(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    options = ("batch", "tokens", "threads", "steps", "lr")
    own = [sys.executable, __file__, args.model, "--arm", arm]
    own += [part for name in options for part in (f"--{name}", str(getattr(args, name)))]
    done = subprocess.run([*shlex.split(args.through), *own], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_arm(args: argparse.Namespace) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    model = loaded(args)
    if args.arm == "check":
        ours.check(args, model)
        return {}
    side = ours if args.arm in ours.ARMS else peers
    side.imports()
    before = resident()
    reset_peak()
    got = side.run(args, args.arm, model, args.steps)
    means = {f"mean_{kind}": statistics.mean(got[kind]) for kind in ("seconds", "cpu_seconds")}
    return got | means | {"peak_bytes": peak() - before}


if __name__ == "__main__":
    main()

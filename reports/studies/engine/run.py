"""Owlore against full fine-tuning on the packaged model and data: 300 steps, three seeds, equal rows in equal order.

python reports/studies/engine/run.py [--work DIR]     trains (about ten minutes on one core) and writes everything here
python reports/studies/engine/run.py --draw           page and picture again, from the runs that are kept here
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
STEPS, SWEEP_STEPS = 300, 60
COMMON = {"batch": 8, "seq_len": 256, "warmup": 5, "device": "cpu"}
ARMS: dict[str, dict[str, Any]] = {
    "owlore": {"method": "owlore", "active": 3, "every": 5, "rank": 64},
    "full": {"method": "full"},
}
RATES = {"owlore": (2.5e-3, 5e-3, 1e-2, 2e-2), "full": (5e-4, 1e-3, 2.5e-3, 5e-3)}
COLOURS = {"owlore": "#2a6f97", "full": "#e07a3f"}
KEPT = ("steps", "tokens", "trainable", "peak_state_bytes", "median_step_seconds", "eval_loss_first", "eval_loss_last",
        "draws", "versions")  # fmt: skip


def train_all(work: Path) -> None:
    """The sweep that chooses each arm's learning rate, then three runs an arm; their records are kept beside this."""
    import htsr
    from owlore.demo import _divide

    train_file, heldout_file, _ = _divide(work)
    table = work / "table.json"
    htsr.scan("demo", plots=False, quiet=True).table(gamma=3).save(table)
    (HERE / "results").mkdir(exist_ok=True)
    for arm in ARMS:
        # Chosen on rows of the training part, with a seed of its own: the held-out rows decide nothing.
        losses = {rate: one(work, arm, table, train_file, 0.2, seed=100, lr=rate, steps=SWEEP_STEPS, name="sweep")
                  ["eval_loss_last"] for rate in RATES[arm]}  # fmt: skip
        best = min(losses, key=lambda rate: losses[rate])
        (HERE / "results" / f"sweep-{arm}.json").write_text(
            json.dumps({"losses": losses, "chosen": best}, indent=1) + "\n"
        )
        for seed in SEEDS:
            kept = one(work, arm, table, train_file, str(heldout_file), seed=seed, lr=best, steps=STEPS, name="run",
                       eval_every=25)  # fmt: skip
            (HERE / "results" / f"{arm}-{seed}.json").write_text(json.dumps(kept) + "\n")


def one(work: Path, arm: str, table: Path, data: Path, heldout: Any, *, name: str, **settings: Any) -> dict[str, Any]:
    """One run; what it leaves that the page needs."""
    import owlore

    own = ARMS[arm] | ({"table": table} if arm == "owlore" else {})
    out = work / f"{name}-{arm}-{settings['seed']}-{settings['lr']:g}"
    run = owlore.train("demo", data, eval_data=heldout, out=out, **COMMON, **own, **settings)
    rows = {split: run.history.query(f"split == '{split}'") for split in ("train", "eval")}
    return {key: run.record[key] for key in KEPT} | {
        "arm": arm, "seed": settings["seed"], "lr": settings["lr"],
        "train": [round(loss, 6) for loss in rows["train"]["loss"]],
        "eval": [[int(step), loss] for step, loss in zip(rows["eval"]["step"], rows["eval"]["loss"], strict=True)],
    }  # fmt: skip


def load() -> dict[str, list[dict[str, Any]]]:
    return {arm: [json.loads((HERE / "results" / f"{arm}-{s}.json").read_text()) for s in SEEDS] for arm in ARMS}


def draw(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Two panels side by side, the same axes: every seed of each arm."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for arm, seeds in runs.items():
        for number, run in enumerate(seeds):
            smooth = np.convolve(run["train"], np.ones(15) / 15, mode="valid")
            label = f"{arm}, three seeds" if number == 0 else None
            left.plot(np.arange(8, 8 + len(smooth)), smooth, color=COLOURS[arm], linewidth=1.2, alpha=0.8, label=label)
            steps, losses = zip(*run["eval"], strict=True)
            right.plot(steps, losses, "o-", color=COLOURS[arm], markersize=3.5, linewidth=1.2, alpha=0.8, label=label)
    for ax, title in ((left, "Training rows (mean of 15 steps)"), (right, "Held-out rows")):
        ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
        ax.set(xlabel="optimizer step", xlim=(0, STEPS + 5))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#eceff1", linewidth=0.8)
        ax.legend(frameon=False, fontsize=9)
    left.set(ylabel="loss (nats a trained token)", ylim=(0, None))
    figure.savefig(HERE / "loss.png")


def page(runs: dict[str, list[dict[str, Any]]]) -> str:
    """README.md: the command, the table, and what the numbers say."""
    sweeps = {arm: json.loads((HERE / "results" / f"sweep-{arm}.json").read_text()) for arm in ARMS}
    lines = []
    for arm, seeds in runs.items():
        last = [run["eval_loss_last"] for run in seeds]
        trained = [statistics.fmean(run["train"][-30:]) for run in seeds]
        first = seeds[0]
        lines.append(
            f"| {arm} | {first['lr']:g} | {first['eval_loss_first']:.3f} | {spread(last)} | "
            f"{spread(trained)} | {first['trainable']:.0%} | {first['peak_state_bytes'] / 1e6:.1f} MB |"
        )
    paired = [a["eval_loss_last"] - b["eval_loss_last"] for a, b in zip(runs["owlore"], runs["full"], strict=True)]
    undrawn = [sum(count == 0 for count in run["draws"]) for run in runs["owlore"]]
    swept = "; ".join(
        f"{arm}: " + ", ".join(f"{float(rate):g} gave {loss:.3f}" for rate, loss in sweep["losses"].items())
        for arm, sweep in sweeps.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in runs["owlore"][0]["versions"].items())
    return (HERE / "page.md").read_text().format(
        table="\n".join(lines), swept=swept, versions=versions, steps=STEPS, sweep_steps=SWEEP_STEPS,
        paired=", ".join(f"{gap:+.3f}" for gap in paired), mean=f"{statistics.fmean(paired):+.3f}",
        sd=f"{statistics.stdev(paired):.3f}", undrawn=", ".join(map(str, undrawn)),
        machine="x86_64, one thread of a shared 2-core AMD EPYC",
    )  # fmt: skip


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where the runs are written; a temporary folder by default")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    asked = parser.parse_args()
    if not asked.draw:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        import torch

        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as scratch:
            work = asked.work or Path(scratch)
            work.mkdir(parents=True, exist_ok=True)
            train_all(work)
    runs = load()
    draw(runs)
    (HERE / "README.md").write_text(page(runs))


if __name__ == "__main__":
    main()

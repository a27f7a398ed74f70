"""README.md, results.json and plots of this study, from the work directory that run.sh filled.

python reports/studies/first-road/collect.py WORK_DIR
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

README = """# The first road: SmolLM2-135M-Instruct, scanned, fine-tuned by its table, killed and resumed

```
python reports/studies/first-road/fetch_smollm2.py models/SmolLM2-135M-Instruct
reports/studies/first-road/run.sh models/SmolLM2-135M-Instruct ../shared/data work
python reports/studies/first-road/collect.py work
```

`run.sh` holds the commands one by one: `htsr scan`, `htsr table`, `owlore train`, a SIGKILL after step 66 (inside a
period of 10 steps; the newest checkpoint is of step 50), and the same `owlore train` with `--resume`.

The model comes from a GGUF file (Q4_1) and is dequantised to fp32, so its spectra carry quantisation noise: compare
blocks with each other, not alphas with those of other models. The data are `commonsense/train_61k.json`; 0.4 % of the
rows were held out by the seed and never trained on. One run, one seed, one learning rate: this shows that the road
holds, not that one method beats another.

| | |
| --- | --- |
| machine | {machine} |
| scan | {matrices} matrices, {alpha_seconds:.1f} s for the spectra, {lod_seconds:.0f} s for LOD ({windows} windows \
of {seq_len} tokens of C4, tau {tau:g}); the machine did other work at the time |
| alpha, mean of a block | {alpha_low:.2f} (block {alpha_low_block}) to {alpha_high:.2f} (block {alpha_high_block}) |
| LOD, percent | {lod_low:.3f} (block {lod_low_block}) to {lod_high:.3f} (block {lod_high_block}) |
| table | rule lod, gamma {gamma}: inclusion {inclusion_low:.3f} to {inclusion_high:.3f} |
| training | {steps} steps of {batch} rows, rank {rank}, K = {every}, lr {lr:g}; {trainable:.2%} of the parameters \
a step |
| **held-out loss, nats a trained token** | **{before:.4f} before, {middle} after 60 steps, \
{after:.4f} after {steps}** |
| killed and resumed | steps {killed_from} to {killed_to} were trained twice: {equal} of {compared} losses equal \
to the last bit |
| draws by block | {draws} |
| speed | {step_seconds:.2f} s a step (median), {tokens_per_s:.0f} tokens/s |
| peak memory of the process | {peak:.2f} GB; weights {weights:.2f} GB, optimizer state at most {state:.3f} GB |
| versions | {versions} |

![loss](plots/loss.png)

![draws](plots/draws.png)

![LOD by depth](plots/lod.png)

![alpha by depth](plots/alpha.png)

Seen: {seen}
"""


def main(work: Path) -> None:
    scan = json.loads((work / "scan/scan.json").read_text())
    table = json.loads((work / "table.json").read_text())
    run = json.loads((work / "run/run.json").read_text())
    rows = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]
    killed = [json.loads(line) for line in (work / "metrics-when-killed.jsonl").read_text().splitlines()]
    facts = scan_facts(work, scan, table) | run_facts(run, rows, killed)
    (HERE / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    (HERE / "README.md").write_text(README.format(**facts))
    (HERE / "plots").mkdir(exist_ok=True)
    for folder, names in (("scan", ("alpha", "lod", "table")), ("run", ("loss", "draws", "draw_counts"))):
        for name in names:
            shutil.copyfile(work / folder / "plots" / f"{name}.png", HERE / "plots" / f"{name}.png")


def scan_facts(work: Path, scan: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    import pandas as pd

    blocks = pd.read_csv(work / "scan/blocks.csv").set_index("block")
    frame = pd.read_csv(work / "scan/scan.csv")
    inclusion = [block["inclusion"] for block in table["blocks"]]
    return {
        "matrices": int((frame["status"] == "ok").sum()),
        "alpha_seconds": scan["seconds"]["alpha"],
        "lod_seconds": scan["seconds"]["lod"],
        "windows": scan["calibration"]["windows"],
        "seq_len": scan["calibration"]["seq_len"],
        "tau": scan["calibration"]["tau"],
        "alpha_low": blocks["alpha"].min(),
        "alpha_low_block": int(blocks["alpha"].idxmin()),
        "alpha_high": blocks["alpha"].max(),
        "alpha_high_block": int(blocks["alpha"].idxmax()),
        "lod_low": blocks["lod"].min(),
        "lod_low_block": int(blocks["lod"].idxmin()),
        "lod_high": blocks["lod"].max(),
        "lod_high_block": int(blocks["lod"].idxmax()),
        "spearman": blocks["lod"].corr(blocks["alpha"], method="spearman"),
        "gamma": table["gamma"],
        "inclusion_low": min(inclusion),
        "inclusion_high": max(inclusion),
    }


def run_facts(run: dict[str, Any], rows: list[dict[str, Any]], killed: list[dict[str, Any]]) -> dict[str, Any]:
    config = run["config"]
    evals = {row["step"]: row["loss"] for row in rows if row["split"] == "eval"}
    train = {row["step"]: row["loss"] for row in rows if row["split"] == "train"}
    twice = {row["step"]: row["loss"] for row in killed if row["split"] == "train" and row["step"] > 50}
    equal = sum(train[step] == loss for step, loss in twice.items())
    never = sum(count == 0 for count in run["draws"])
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU only",
        "steps": run["steps"],
        "batch": config["batch"],
        "rank": config["rank"],
        "every": config["every"],
        "lr": config["lr"],
        "trainable": run["trainable"],
        "before": evals[0],
        "middle": f"{evals[60]:.4f}",
        "after": evals[max(evals)],
        "killed_from": 51,
        "killed_to": max(twice),
        "equal": equal,
        "compared": len(twice),
        "draws": " ".join(map(str, run["draws"])),
        "step_seconds": run["median_step_seconds"],
        "tokens_per_s": run["tokens_per_s"],
        "peak": run["peak_bytes"] / 1e9,
        "weights": run["model"]["parameters"] * 4 / 1e9,
        "state": run["peak_state_bytes"] / 1e9,
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "seen": f"the loss on rows that were never trained on fell from {evals[0]:.3f} to {evals[max(evals)]:.3f}; the "
        f"resumed run repeated the lost steps exactly; {never} of {len(run['draws'])} blocks were never drawn in "
        f"{sum(run['draws']) // 5} periods, as exact inclusion allows (a --floor bounds it).",
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))

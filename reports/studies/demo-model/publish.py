"""Copies the trained model into the package and writes its model card from what is measured on the copy.

    python publish.py build/demo-model htsr/assets

Also draws `loss.png` and saves `log.csv` and `figures.json` beside this script.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from string import Template
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from measure import block_outliers, calibration_windows, perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def measure(directory: Path, calibration: Path, work: Path) -> dict[str, Any]:
    """Every figure that the card states, of the files in `directory`."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ppl, bits, count = perplexity(model, (directory / "heldout.txt").read_text(encoding="utf-8"), tokenizer)
    windows = calibration_windows(calibration.read_text(encoding="utf-8"), tokenizer)
    lod = block_outliers(model, windows)
    return {
        "parameters": model.num_parameters(),
        "megabytes": round((directory / "model.safetensors").stat().st_size / 1e6, 2),
        "heldout_perplexity": round(ppl, 4),
        "heldout_bits_per_byte": round(bits, 4),
        "heldout_tokens": count,
        "lod_percent": [round(a, 4) for a, _ in lod],
        "lod_weight_percent": [round(b, 4) for _, b in lod],
        "settings": json.loads((work / "settings.json").read_text()),
        "versions": {"torch": torch.__version__},
    }


def card(figures: dict[str, Any], log: list[dict[str, str]]) -> str:
    """The model card; `card.md` beside this script is its text with $names for the figures."""
    s = figures["settings"]
    rows = [
        f"| {k} | {a:.4f} | {b:.4f} |"
        for k, (a, b) in enumerate(zip(figures["lod_percent"], figures["lod_weight_percent"], strict=True))
    ]
    values = {
        **s,
        **figures,
        "parameters": f"{figures['parameters']:,}",
        "heldout_tokens": f"{figures['heldout_tokens']:,}",
        "steps": f"{s['steps']:,}",
        "tokens": f"{s['steps'] * s['tokens_per_step'] / 1e6:.1f}",
        "epochs": f"{s['steps'] * s['tokens_per_step'] / s['training_tokens']:.1f}",
        "train_loss": log[-1]["train_loss"],
        "minutes": f"{float(log[-1]['seconds']) / 60:.0f}",
        "outliers": "\n".join(rows),
    }
    return Template((HERE / "card.md").read_text(encoding="utf-8")).substitute(values)


def draw(log: list[dict[str, str]], target: Path) -> None:
    figure, left = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    tokens = [float(row["tokens"]) / 1e6 for row in log]
    left.plot(tokens, [float(row["train_loss"]) for row in log], color="C0")
    left.set_xlabel("tokens seen (millions)")
    left.set_ylabel("training loss (nats per token)", color="C0")
    right = left.twinx()
    right.plot(tokens, [float(row["heldout_perplexity"]) for row in log], color="C1")
    right.set_ylabel("held-out perplexity (per token)", color="C1")
    left.set_title("Demo model on the King James text")
    figure.savefig(target, dpi=110)


def main(work: Path, assets: Path) -> None:
    demo = assets / "demo"
    demo.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(work / "model" / name, demo / name)
    shutil.copyfile(work / "heldout.txt", demo / "heldout.txt")
    shutil.copyfile(work / "log.csv", HERE / "log.csv")
    with (work / "log.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    figures = measure(demo, assets / "calibration.txt", work)
    (HERE / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (demo / "README.md").write_text(card(figures, log), encoding="utf-8")
    draw(log, HERE / "loss.png")
    total = sum(f.stat().st_size for f in demo.iterdir())
    print(f"{demo}: {total:,} bytes, held-out perplexity {figures['heldout_perplexity']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

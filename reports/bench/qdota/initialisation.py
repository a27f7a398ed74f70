"""Do cores of the pre-trained weight learn faster than random ones? The demo model on its own rows, five seeds.

python reports/bench/qdota/initialisation.py [--out FILE.json] [--steps 25]

Both start from exactly the base's output (implicit residual), with the same rows in the same order, and AdamW without
decay. The loss is the mean over the last tenth of the steps; each learning rate is given to both.
"""

from __future__ import annotations

import argparse
import json
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from owlore.adapters import DotaConfig

RATES = (3e-3, 1e-2)
SHAPE = {"num_cores": 3, "bond": 8}
SEEDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    folder = files("htsr").joinpath("assets/demo")
    rows = encoded(folder)
    found: list[dict[str, Any]] = []
    print("    rate      mpo   random   mpo lower in")
    for rate in RATES:
        row: dict[str, Any] = SHAPE | {"rate": rate}
        for init in ("mpo", "random"):
            row[init] = [trained(folder, rows, SHAPE | {"init": init}, rate, args.steps, seed) for seed in range(SEEDS)]
        found.append(row)
        means = [sum(row[init]) / SEEDS for init in ("mpo", "random")]
        wins = sum(a < b for a, b in zip(row["mpo"], row["random"], strict=True))
        print(f"{rate:>8g} {means[0]:>8.4f} {means[1]:>8.4f}   {wins} of {SEEDS}")
    if args.out:
        args.out.write_text(
            json.dumps({"steps": args.steps, "torch": torch.__version__, "rows": found}, indent=1) + "\n"
        )


def encoded(folder: Any, length: int = 48) -> Tensor:
    """The packaged rows as plain text, cut and padded to one length."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = files("owlore").joinpath("assets/demo-data.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [" ".join(json.loads(line)[key] for key in ("input", "instruction", "output")) for line in lines]
    ends = tokenizer.eos_token_id
    cut = [[*tokenizer(text, add_special_tokens=False)["input_ids"][: length - 1], ends] for text in texts]
    return torch.tensor([tokens + [ends] * (length - len(tokens)) for tokens in cut])


def trained(folder: Any, rows: Tensor, config: dict[str, Any], rate: float, steps: int, seed: int) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, DotaConfig(target_modules="all-linear", seed=seed, **config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    stream = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (8,), generator=stream)]
        ends = batch == batch[:, -1:]
        labels = batch.masked_fill(ends & (ends.cumsum(1) > 1), -100)  # padding after the first end does not count
        loss = model(input_ids=batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


if __name__ == "__main__":
    main()

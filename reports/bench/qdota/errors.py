"""Does taking an MPO off a weight make what NF4 loses smaller? Every linear map of a model's blocks.

python reports/bench/qdota/errors.py MODEL_DIR [--out FILE.json] [--windows 4]

Relative Frobenius errors over all maps together: ||W - NF4(W)|| (direct) against ||W - NF4(W - MPO) - MPO|| (residual),
with 0 and 3 rounds of alternation, by number of cores and bond; then the loss of the whole model on public-domain text.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from owlore.adapters import DotaConfig
from owlore.adapters.dota_layer import first_cores
from owlore.adapters.targets import find_targets
from owlore.kernels.mpo import make_shape, rebuild
from owlore.kernels.nf4 import dequantise, planned_bytes, quantise

CASES = [(2, 32), (3, 8), (3, 16), (3, 64), (4, 16)]
WITH_LOSS = [(2, 32), (3, 16), (3, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    windows = text_windows(args.model, args.windows)
    weights = {t.name: t.module.weight.detach() for t in find_targets(model, settings())}
    total = math.sqrt(sum(float(w.double().square().sum()) for w in weights.values()))
    direct = lost(weights, {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}) / total
    entries = sum(w.numel() for w in weights.values())
    result: dict[str, Any] = {"model": args.model.name, "matrices": len(weights), "entries": entries,
                              "nf4_bytes": sum(planned_bytes(w.numel()) for w in weights.values()),
                              "direct": direct, "loss_fp32": loss(model, windows),
                              "loss_direct": loss(adapted(model, quantise="nf4"), windows), "rows": []}  # fmt: skip
    print(f"{len(weights)} matrices, {entries:,} entries; direct {direct:.5f}")
    print(f"loss: fp32 {result['loss_fp32']:.4f}, direct NF4 {result['loss_direct']:.4f}")
    print("cores bond  cores/W   left  residual  / direct  3 rounds  / direct     loss  3 rounds")
    for num_cores, bond in CASES:
        row = measure(weights, total, direct, num_cores, bond)
        if (num_cores, bond) in WITH_LOSS:
            for turns in (0, 3):
                choice = {"num_cores": num_cores, "bond": bond, "alternations": turns}
                row[f"loss_{turns}"] = loss(adapted(model, residual="explicit", quantise="nf4", **choice), windows)
        result["rows"].append(row)
        losses = "".join(f"{row[k]:>10.4f}" if k in row else f"{'':>10}" for k in ("loss_0", "loss_3"))
        print(f"{num_cores:>5} {bond:>4} {row['share']:>8.2%} {row['left']:>6.3f} {row['residual']:>9.5f} "
              f"{row['residual'] / direct:>9.4f} {row['alternated']:>9.5f} {row['alternated'] / direct:>9.4f}"
              f"{losses}".rstrip())  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result | {"torch": torch.__version__}, indent=1) + "\n")


def settings(**choice: Any) -> DotaConfig:
    return DotaConfig(target_modules="all-linear", **choice)


def adapted(model: nn.Module, **choice: Any) -> nn.Module:
    return get_peft_model(copy.deepcopy(model), settings(**choice))


def measure(weights: dict[str, Tensor], total: float, direct: float, num_cores: int, bond: int) -> dict[str, Any]:
    row: dict[str, Any] = {"num_cores": num_cores, "bond": bond}
    count = 0
    for turns, key in ((0, "residual"), (3, "alternated")):
        config = settings(bond=bond, residual="explicit", quantise="nf4", alternations=turns)
        products = {}
        for name, weight in weights.items():
            shape = make_shape(*weight.shape, num_cores, bond)
            cores = [core.float().double() for core in first_cores(weight, shape, config, name)]
            products[name] = rebuild(cores, shape)
            count += shape.parameters if not turns else 0
        if not turns:
            rest = sum(float((w.double() - products[name]).square().sum()) for name, w in weights.items())
            row["left"] = math.sqrt(rest) / total
        row[key] = lost(weights, products) / total
    return row | {"share": count / sum(w.numel() for w in weights.values())}


def lost(weights: dict[str, Tensor], products: dict[str, Tensor]) -> float:
    """Frobenius norm of what NF4 loses of all residuals together."""
    squares = 0.0
    for name, weight in weights.items():
        residual = (weight.double() - products[name]).float()
        error = dequantise(quantise(residual)).double() + products[name] - weight.double()
        squares += float(error.square().sum())
    return math.sqrt(squares)


def text_windows(model: Path, count: int, length: int = 256) -> Tensor:
    text = files("htsr").joinpath("assets/calibration.txt").read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    return tokens[: count * length].view(count, length)


@torch.no_grad()
def loss(model: nn.Module, windows: Tensor) -> float:
    """Nats a token."""
    return sum(float(model(input_ids=w[None], labels=w[None]).loss) for w in windows) / len(windows)


if __name__ == "__main__":
    main()

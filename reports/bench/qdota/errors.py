"""Does taking an MPO off a weight make what NF4 loses smaller? Every linear map of a model's blocks.

python reports/bench/qdota/errors.py MODEL_DIR [--out FILE.json] [--windows 4] [--every 1]

Relative Frobenius errors over all maps together: ||W - NF4(W)|| (direct) against ||W - NF4(W - MPO) - MPO|| (residual),
by number of cores and bond, for some with 3 rounds of alternation too; and the whole model's loss with those weights on
public-domain text.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from owlore.adapters import DotaConfig
from owlore.adapters.dota_layer import first_cores
from owlore.adapters.targets import find_targets
from owlore.kernels.mpo import make_shape, rebuild
from owlore.kernels.nf4 import dequantise, planned_bytes, quantise

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = [(3, 16), (2, 32), (3, 8), (3, 64), (4, 16)]
ALTERNATED = [(3, 16)]
WITH_LOSS = [(3, 16), (3, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=4, help="windows of text for the loss; 0 for none")
    parser.add_argument("--every", type=int, default=1, help="take every so-manieth block")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    windows = text_windows(args.model, args.windows)
    layers = list(range(0, model.config.num_hidden_layers, args.every))
    targets = find_targets(model, settings(layers_to_transform=layers, target_modules=LINEAR))
    weights = {target.name: target.module.weight.detach() for target in targets}
    total = math.sqrt(sum(float(w.double().square().sum()) for w in weights.values()))
    entries = sum(w.numel() for w in weights.values())
    nothing = {name: torch.zeros(()) for name in weights}
    result: dict[str, Any] = {"matrices": len(weights), "entries": entries, "windows": args.windows, "rows": [],
                              "nf4_bytes": sum(planned_bytes(w.numel()) for w in weights.values()),
                              "loss_fp32": loss(model, windows)}  # fmt: skip
    approximate, lost = quantised(weights, nothing)
    direct = lost / total
    result |= {"direct": direct, "loss_direct": loss_with(model, approximate, windows)}
    print(f"{len(weights)} matrices, {entries:,} entries, {result['nf4_bytes']:,} bytes in NF4; direct {direct:.5f}")
    print(f"loss: fp32 {result['loss_fp32']:.4f}, direct NF4 {result['loss_direct']:.4f}")
    for block in (32, 16):
        smaller = quantised(weights, nothing, block)[1] / total
        bits = 8 * sum(planned_bytes(w.numel(), block) for w in weights.values()) / entries
        result[f"direct_block_{block}"] = smaller
        print(f"direct in blocks of {block}, {bits:.3f} bits: {smaller:.5f}, {smaller / direct:.4f} of blocks of 64")
    print("cores bond rounds  cores/W   left  residual  / direct     loss")
    for num_cores, bond in CASES:
        for rounds in (0, 3) if (num_cores, bond) in ALTERNATED else (0,):
            row, approximate = measure(weights, total, num_cores, bond, rounds)
            if (num_cores, bond) in WITH_LOSS:
                row["loss"] = loss_with(model, approximate, windows)
            result["rows"].append(row)
            loss_there = f"{row['loss']:.4f}" if "loss" in row else ""
            head = f"{num_cores:>5} {bond:>4} {rounds:>6} {row['share']:>8.2%} {row['left']:>6.3f}"
            print(f"{head} {row['residual']:>9.5f} {row['residual'] / direct:>9.4f} {loss_there:>8}".rstrip())
    if args.out:
        args.out.write_text(json.dumps(result | {"torch": torch.__version__}, indent=1) + "\n")


def settings(**choice: Any) -> DotaConfig:
    return DotaConfig(**choice)


def measure(
    weights: dict[str, Tensor], total: float, num_cores: int, bond: int, rounds: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Relative errors of one choice, and the weights that a QDoTA adapter would start from."""
    choice = {"residual": "explicit", "quantise": "nf4", "alternations": rounds}
    config, products, count = settings(num_cores=num_cores, bond=bond, **choice), {}, 0
    for name, weight in weights.items():
        shape = make_shape(*weight.shape, num_cores, bond)
        cores = first_cores(weight, shape, config, name)
        products[name] = rebuild([core.float() for core in cores], shape)
        count += shape.parameters
    left = math.sqrt(sum(float((w - products[name]).double().square().sum()) for name, w in weights.items()))
    approximate, lost = quantised(weights, products)
    row = {"num_cores": num_cores, "bond": bond, "rounds": rounds, "left": left / total, "residual": lost / total}
    return row | {"share": count / sum(w.numel() for w in weights.values())}, approximate


def quantised(
    weights: dict[str, Tensor], products: dict[str, Tensor], block: int = 64
) -> tuple[dict[str, Tensor], float]:
    """NF4(W - product) + product of every weight, and the Frobenius norm of what all of them lost."""
    found = {name: dequantise(quantise(w - products[name], block)) + products[name] for name, w in weights.items()}
    return found, math.sqrt(sum(float((found[name] - w).double().square().sum()) for name, w in weights.items()))


def loss_with(model: nn.Module, weights: dict[str, Tensor], windows: Tensor) -> float:
    if not len(windows):
        return math.nan
    names = {f"{name}.weight": weight for name, weight in weights.items()}
    changed = torch.func.functional_call
    with torch.no_grad():
        losses = [float(changed(model, names, kwargs={"input_ids": w[None], "labels": w[None]}).loss) for w in windows]
    return sum(losses) / len(losses)


def text_windows(model: Path, count: int, length: int = 256) -> Tensor:
    text = files("htsr").joinpath("assets/calibration.txt").read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    return tokens[: count * length].view(count, length)


def loss(model: nn.Module, windows: Tensor) -> float:
    """Nats a token."""
    return loss_with(model, {}, windows)


if __name__ == "__main__":
    main()

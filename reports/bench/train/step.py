"""Step time and peak memory of training methods on one model, each in a process of its own; ratios in one run.

python reports/bench/train/step.py MODEL_DIR [--batch 4 --tokens 256 --threads 2 --rounds 1] [--out FILE.json]

Sampled arms draw pairs (i, i + L/2), so that every block is drawn equally often; the mean is over all pairs. Peak
memory is the high-water mark of the resident set over the whole arm, above the resident set of the loaded model. All
arms see the same tokens in fp32, and every token is a target. Correctness first: before anything is timed, one step of
our full fine-tuning has to give the loss and the gradient norm of transformers' own model.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ARMS = {
    "full": "our full fine-tuning, AdamW",
    "full+ckpt": "the same, activations recomputed",
    "owlore-2": "two blocks, rank 128, embeddings frozen",
    "owlore-2+ckpt": "the same, activations recomputed",
    "owlore-1": "one block, rank 128, embeddings frozen",
    "badam-1": "one block, AdamW, the same draws",
    "lora-16": "PEFT LoRA, rank 16, all linear maps",
    "adamw": "torch.optim.AdamW on transformers' own loss",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args)))
        return
    check_correctness(args)
    results = {name: in_own_process(args, name) for name in args.arms.split(",")}
    base = results.get("full", next(iter(results.values())))
    print(f"{'arm':<14} {'s/step':>8} {'x full':>7} {'peak MB':>9} {'x full':>7} {'loss':>8}  what")
    for name, got in results.items():
        got["time_ratio"] = got["mean_seconds"] / base["mean_seconds"]
        got["peak_ratio"] = got["peak_bytes"] / base["peak_bytes"]
        print(f"{name:<14} {got['mean_seconds']:>8.3f} {got['time_ratio']:>7.2f} {got['peak_bytes'] / 1e6:>9.0f} "
              f"{got['peak_ratio']:>7.2f} {got['last_loss']:>8.4f}  {ARMS[name]}")  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({"settings": settings(args), "arms": results}, indent=1) + "\n")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "model": Path(args.model).name, "batch": args.batch, "tokens": args.tokens, "threads": args.threads,
        "rounds": args.rounds, "machine": platform.machine(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


def in_own_process(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    command = [sys.executable, __file__, args.model, "--arm", arm, "--batch", str(args.batch), "--tokens",
               str(args.tokens), "--threads", str(args.threads), "--rounds", str(args.rounds)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def loaded(args: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()


def batches(args: argparse.Namespace, vocabulary: int) -> Iterator[Any]:
    """Seeded token ids; what they say does not matter for time and memory."""
    import torch

    stream = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(4, vocabulary - 1, (args.batch, args.tokens), generator=stream)


def check_correctness(args: argparse.Namespace) -> None:
    import torch

    from owlore.blocks import find_units, freeze
    from owlore.optim import RotatingOptimizer, Rule
    from owlore.train.loss import CausalLoss

    model = loaded(args)
    ids = next(batches(args, model.config.vocab_size))[:1, :64]
    own = model(input_ids=ids, labels=ids).loss
    own.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    freeze(model)
    units = find_units(model)
    parameters = units.parameters(range(units.num_blocks), units.groups)
    optimizer = RotatingOptimizer(parameters, seed=0)
    optimizer.switch(dict.fromkeys(parameters, Rule()), 0)
    loss = CausalLoss(model)(ids, ids) / (ids.shape[1] - 1)
    loss.backward()
    ours = optimizer.gradient_norm()
    assert abs(float(loss.detach()) - float(own.detach())) <= 1e-5 * float(own.detach()), (loss, own)
    assert abs(float(ours) - float(norm)) <= 1e-4 * float(norm), (ours, norm)


def run_arm(args: argparse.Namespace) -> dict[str, Any]:
    model = loaded(args)
    data = batches(args, model.config.vocab_size)
    one_step, draws = (torch_arm if args.arm in ("lora-16", "adamw") else our_arm)(args, model)
    one_step(next(data), draws[0])  # warm-up
    reset_peak()
    seconds, losses = [], []
    for _ in range(args.rounds):
        for draw in draws:
            ids = next(data)
            started = time.perf_counter()
            losses.append(one_step(ids, draw))
            seconds.append(time.perf_counter() - started)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "mean_seconds": statistics.mean(seconds), "seconds": seconds, "last_loss": losses[-1],
        "peak_bytes": peak() - run_arm.at_load, "weights_bytes": weights,
    }  # fmt: skip


def our_arm(args: argparse.Namespace, model: Any) -> tuple[Callable[[Any, Any], float], list[Any]]:
    from owlore.blocks import find_units, freeze
    from owlore.kernels.adamw import AdamW
    from owlore.optim import RotatingOptimizer, Rule
    from owlore.train.loss import CausalLoss
    from owlore.train.recompute import Recompute

    run_arm.at_load = resident()
    freeze(model)
    units = find_units(model)
    name, _, extra = args.arm.partition("+")
    groups = tuple(units.groups) if name == "full" else ()
    rank = 128 if name.startswith("owlore") else None
    optimizer = RotatingOptimizer(units.parameters(range(units.num_blocks), units.groups), seed=0)
    loss, recompute = CausalLoss(model), Recompute(units.modules, enabled=extra == "ckpt")
    state = {"step": 0, "draw": None}

    def one_step(ids: Any, draw: tuple[int, ...]) -> float:
        step = state["step"]
        if draw != state["draw"]:
            rules = dict.fromkeys(units.parameters(draw, groups), Rule(adam=AdamW(), rank=rank))
            optimizer.switch(rules, step)
            recompute.lowest = 0 if groups else draw[0]
            state["draw"] = draw
        optimizer.micro_batch(step, last=True)
        mean = loss(ids, ids) / (ids.numel() - len(ids))
        mean.backward()
        optimizer.update(1e-5, 1.0)
        state["step"] = step + 1
        return float(mean.detach())

    blocks = units.num_blocks
    if name == "full":
        return one_step, [tuple(range(blocks))] * 5
    if name.endswith("-1"):
        return one_step, [(i,) for i in range(blocks)]
    return one_step, [(i, i + blocks // 2) for i in range(blocks // 2)]


def torch_arm(args: argparse.Namespace, model: Any) -> tuple[Callable[[Any, Any], float], list[Any]]:
    import torch

    run_arm.at_load = resident()
    if args.arm == "lora-16":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def one_step(ids: Any, draw: Any) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return one_step, [None] * 5


def resident() -> int:
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def reset_peak() -> None:
    """Linux: start the high-water mark of the resident set anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()

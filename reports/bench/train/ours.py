"""The arms of this project: the engine's own pieces in the order of its loop."""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from itertools import cycle
from typing import Any

from measure import Clock, even_pairs, every_third, steep_pairs, token_batches

ARMS = {
    "full": "AdamW on everything, --method full",
    "owlore-2": "two blocks, uniform, rank 128, embeddings frozen",
    "owlore-2+ckpt": "the same with --checkpointing on",
    "owlore-2 steep": "two blocks, table as steep as LLaMA-2's",
    "owlore-1": "one block, rank 128, every third block once",
    "full+compile": "full with --compile",
    "owlore-2+compile": "two blocks with --compile",
    "lisa-2": "--method lisa: two blocks, embeddings on",
    "galore": "--method galore: all blocks, rank 128",
    "full again": "the first arm once more: how steady the machine is",
}
PERIOD = 50  # steps of a real period, the first of which draws and finds the bases


def imports() -> None:
    """Modules whose code is not to be charged to the first step."""
    import owlore.run.api  # noqa: F401


def run(args: argparse.Namespace, arm: str, model: Any, steps: int) -> dict[str, Any]:
    """Seconds and losses by step, the first step (warm-up) apart."""
    import torch

    from owlore.activations.checkpointing import ActivationCheckpointing
    from owlore.activations.compiled import compile_blocks
    from owlore.activations.malloc_trim import trimmed_heap
    from owlore.activations.saved_tensors import saved_tensors_in_arena
    from owlore.blocks import find_parts, freeze
    from owlore.data.batches import MicroBatch
    from owlore.kernels.adamw import AdamW
    from owlore.optim import RotatingOptimizer, UpdateSpec
    from owlore.patches import PatchStack
    from owlore.training.loss import CausalLoss
    from owlore.training.resident import ResidentBackend
    from owlore.training.step import train_step

    freeze(model)
    parts = find_parts(model)
    name = arm.partition("+")[0].partition(" ")[0]
    groups = tuple(parts.groups) if name in ("full", "lisa-2", "galore") else ()
    rank = 128 if name.startswith("owlore") or name == "galore" else None
    compiles = arm.endswith("+compile")
    optimizer = RotatingOptimizer(
        parts.parameters(range(parts.num_blocks), parts.groups), seed=0, layers=() if compiles else parts.modules
    )
    recompute = ActivationCheckpointing(parts.modules, enabled=arm.endswith("+ckpt"))
    backend = ResidentBackend(parts, optimizer, CausalLoss(model), torch.device("cpu"), recompute)
    patches = PatchStack()
    if compiles:
        compile_blocks(parts.modules, device=torch.device("cpu"), patches=patches)
    clock, losses = Clock(), []
    draws, repeats = draws_of(arm, parts.num_blocks, steps)
    with (
        trimmed_heap(parts.modules, torch.device("cpu")),
        saved_tensors_in_arena(parts.modules, enabled=not compiles and not arm.endswith("+ckpt")),
    ):
        for step, ids in zip(range(-1, len(draws) * repeats), cycle(token_batches(args)), strict=False):
            clock.start()
            draw = draws[max(0, step) // repeats]
            if step < 0 or step % repeats == 0:
                rules = {
                    n: UpdateSpec(adam=AdamW(), rank=rank if p.ndim > 1 and n not in _outside(parts) else None)
                    for n, p in parts.parameters(draw, groups).items()
                }
                optimizer.switch(rules, step + 1, between=partial(backend.set_active, rules))
            part = MicroBatch(input_ids=ids, labels=ids, num_trained=ids.numel() - len(ids))
            result = train_step(backend, optimizer, {0: part}, step=step + 1, lr=args.lr, clip=1.0, seed=0)
            clock.stop()
            losses.append(result.loss)
            if step < 0:
                graphs = _graphs() if compiles else 0
    assert not compiles or _graphs() == graphs, f"{_graphs() - graphs} graphs were compiled after the first step"
    patches.close()
    return {
        "seconds": of_a_period(clock.wall[1:], repeats), "cpu_seconds": of_a_period(clock.cpu[1:], repeats),
        "first_cpu_seconds": clock.cpu[1::repeats], "losses": losses[1:], "state_bytes": optimizer.held().total,
        "warm_up_seconds": clock.wall[0], "graphs": graphs,
        "mean_depth": sum(parts.num_blocks - min(d) for d in draws) / len(draws), "draws": draws,
    }  # fmt: skip


def of_a_period(seconds: list[float], repeats: int) -> list[float]:
    """Mean step of a period by draw, from its first step (the draw and the bases) and those after it."""
    draws = [seconds[start : start + repeats] for start in range(0, len(seconds), repeats)]
    return [(first + (PERIOD - 1) * statistics.mean(later)) / PERIOD for first, *later in draws]


def draws_of(arm: str, blocks: int, steps: int) -> tuple[list[tuple[int, ...]], int]:
    """(draws, steps of each): twice every draw, or one draw for all steps."""
    if arm.endswith("steep"):
        return steep_pairs(blocks), 2
    if "-2" in arm:
        return even_pairs(blocks), 2
    if "-1" in arm:
        return [(block,) for block in every_third(blocks)], 2
    return [tuple(range(blocks))], steps


def _graphs() -> int:
    """Graphs that torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _outside(parts: Any) -> set[str]:
    return {name for group in parts.groups.values() for name, _ in group}


def check(args: argparse.Namespace, model: Any) -> None:
    """One step of our full fine-tuning has to give the loss and the gradient norm of transformers' own model."""
    import torch

    from owlore.blocks import find_parts, freeze
    from owlore.data.batches import MicroBatch
    from owlore.optim import RotatingOptimizer, UpdateSpec
    from owlore.training.loss import CausalLoss
    from owlore.training.resident import ResidentBackend
    from owlore.training.step import train_step

    ids = token_batches(args)[0][:1, :64]
    own = model(input_ids=ids, labels=ids).loss
    own.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    freeze(model)
    parts = find_parts(model)
    parameters = parts.parameters(range(parts.num_blocks), parts.groups)
    optimizer = RotatingOptimizer(parameters, seed=0)
    optimizer.switch(dict.fromkeys(parameters, UpdateSpec()), 0)
    backend = ResidentBackend(parts, optimizer, CausalLoss(model), torch.device("cpu"))
    part = MicroBatch(input_ids=ids, labels=ids, num_trained=ids.shape[1] - 1)
    ours = train_step(backend, optimizer, {0: part}, step=0, lr=0.0, clip=None, seed=0)
    assert abs(ours.loss - float(own.detach())) <= 1e-5 * float(own.detach()), (ours.loss, own)
    assert abs(ours.norm - float(norm)) <= 1e-4 * float(norm), (ours.norm, norm)

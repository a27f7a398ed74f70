"""Does `owlore plan` say what a step takes? Planned bytes against the bytes that living tensors hold, step by step.

python reports/bench/plan/check.py MODEL... [--tokens 256] [--batch 4] [--out FILE.json]

A mode below every operator counts the storages that are made and those that die; weights and optimizer state are
counted tensor by tensor. The draw is the plan's worst one, for which it plans.
"""

from __future__ import annotations

import argparse
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from owlore.activations.checkpointing import ActivationCheckpointing
from owlore.blocks import find_parts, freeze
from owlore.config import TrainConfig
from owlore.data.batches import MicroBatch
from owlore.layer_table import find_table
from owlore.models.loading import load
from owlore.optim import RotatingOptimizer
from owlore.plan.model_spec import spec_of_model
from owlore.plan.planner import Planner
from owlore.settings import master_policy, recomputes, resolve, strategy_config
from owlore.training.loss import CausalLoss
from owlore.training.resident import ResidentBackend
from owlore.training.step import train_step

ARMS: dict[str, dict[str, Any]] = {
    "owlore": {"method": "owlore", "table": "uniform", "active": 2},
    "owlore, checkpointing": {"method": "owlore", "table": "uniform", "active": 2, "checkpointing": "on"},
    "lisa": {"method": "lisa"},
    "galore": {"method": "galore"},
    "full": {"method": "full"},
}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that still live; those of `own` do not count."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own, self.seen, self.now, self.peak = own, dict[int, int](), 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.own and key not in self.seen and storage.nbytes():
                    self.seen[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.seen.pop(key, 0)


def check(model: str, arm: str, batch: int, tokens: int) -> dict[str, Any]:
    """Planned and counted bytes of two steps of one method."""
    config, strategy_class = resolve(
        TrainConfig.build({"model": model, "batch": batch, "seq_len": tokens, "steps": 2, **ARMS[arm]})
    )
    loaded = load(model, dtype="float32", attn="sdpa", device=torch.device("cpu")).model.train()
    shape = spec_of_model(loaded)
    wanted = config.table if strategy_class.table is not None else None
    table = find_table(
        wanted, num_blocks=shape.parts.num_blocks, scan=lambda: None, notify=lambda _: None, weights_sha256=""
    )
    planned = Planner(strategy=strategy_class, describe=lambda _: shape, device="cpu", table=table, tokens=tokens).plan(
        config
    )
    freeze(loaded)
    parts = find_parts(loaded)
    strategy = strategy_class(parts, strategy_config(config, table))
    deepest = min(range(60), key=lambda period: min(strategy.blocks_at(period)))
    rules = strategy.specs_at(deepest)
    optimizer = RotatingOptimizer(
        parts.parameters(range(parts.num_blocks), parts.groups),
        seed=0,
        policy=master_policy(config),
        layers=parts.modules,
    )
    recompute = ActivationCheckpointing(parts.modules, enabled=recomputes(config, parts))
    backend = ResidentBackend(parts, optimizer, CausalLoss(loaded), torch.device("cpu"), recompute)
    own = {t.untyped_storage()._cdata for t in (*loaded.parameters(), *loaded.buffers())}
    stream = torch.Generator().manual_seed(0)
    with LiveBytes(own) as live:
        optimizer.switch(rules, 0, between=lambda: backend.set_active(rules))
        for step in range(2):
            ids = torch.randint(4, shape.vocabulary - 4, (batch, tokens), generator=stream)
            part = MicroBatch(input_ids=ids, labels=ids, num_trained=ids.numel() - len(ids))
            train_step(backend, optimizer, {0: part}, step=step, lr=1e-4, clip=1.0, seed=0)
    weights = sum(p.numel() * p.element_size() for p in loaded.parameters())
    held = optimizer.held()
    return {
        "model": model, "arm": arm, "planned": planned.bytes["total"], "counted": weights + live.peak,
        "off": planned.bytes["total"] / (weights + live.peak) - 1,
        "off_without_weights": (planned.bytes["total"] - weights) / live.peak - 1,
        "state_exact": (planned.bytes["masters"], planned.bytes["optimizer"])
        == (held.masters, held.moments + held.projectors),
        "weights_exact": planned.bytes["weights"] == weights,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'model':<24} {'arm':<22} {'planned MB':>10} {'counted MB':>10} {'off':>7} {'w/o weights':>11}  bytes held")
    for model in asked.models:
        for arm in ARMS:
            row = check(model, arm, asked.batch, asked.tokens) | {"model": Path(model).name}
            rows.append(row)
            exact = "exact" if row["state_exact"] and row["weights_exact"] else "OFF"
            print(
                f"{row['model']:<24} {arm:<22} {row['planned'] / 1e6:>10.1f} {row['counted'] / 1e6:>10.1f} "
                f"{row['off']:>+7.1%} {row['off_without_weights']:>+11.1%}  {exact}",
                flush=True,
            )
    if asked.out:
        asked.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What `owlore plan` says of a step beside what is counted and what is measured, in bytes above the weights.

python reports/bench/train/planned.py MODEL_DIR|demo [--methods owlore,lisa,galore,full] [--tokens 256]

Planned: total minus weights, of the worst draw. Counted: the most bytes of living tensors that operators made, over
two steps of that draw. Measured: the high-water mark of the resident set of two such steps in a process that counts
nothing, above the loaded model; the libraries' own working memory is in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from measure import loaded, peak, reset_peak, resident, token_batches

METHODS = ("owlore", "owlore+ckpt", "lisa", "galore", "full", "full+ckpt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(one(args, *args.only.split())))
        return
    print(f"{'method':<12} {'state planned':>13} {'counted':>9} {'peak planned':>13} {'counted':>9} {'ratio':>6} "
          f"{'measured':>9} {'ratio':>6}   MB")  # fmt: skip
    for method in args.methods.split(","):
        counted, measured = (in_own_process(args, method, how) for how in ("counted", "measured"))
        planned, state = counted["planned"], counted["planned_state"]
        print(f"{method:<12} {state / 1e6:>13.3f} {counted['state'] / 1e6:>9.3f} {planned / 1e6:>13.1f} "
              f"{counted['peak'] / 1e6:>9.1f} {planned / counted['peak']:>6.2f} "
              f"{measured['peak'] / 1e6:>9.1f} {planned / measured['peak']:>6.2f}", flush=True)  # fmt: skip


def in_own_process(args: argparse.Namespace, method: str, how: str) -> dict[str, Any]:
    own = [sys.executable, __file__, args.model, "--only", f"{method} {how}"]
    own += [part for name in ("batch", "tokens", "threads") for part in (f"--{name}", str(getattr(args, name)))]
    done = subprocess.run(own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def one(args: argparse.Namespace, method: str, how: str) -> dict[str, Any]:
    import numpy as np
    import torch

    from htsr.model.locate import locate
    from owlore.activations.checkpointing import ActivationCheckpointing
    from owlore.activations.malloc_trim import trimmed_heap
    from owlore.activations.saved_tensors import saved_tensors_in_arena
    from owlore.blocks import find_parts, freeze
    from owlore.config import TrainConfig
    from owlore.data.batches import MicroBatch
    from owlore.optim import RotatingOptimizer
    from owlore.plan.model_spec import spec_of_model
    from owlore.plan.plan import make_plan
    from owlore.settings import master_policy, resolve, strategy_config
    from owlore.training.loss import CausalLoss
    from owlore.training.resident import ResidentBackend
    from owlore.training.step import train_step

    warnings.simplefilter("ignore")
    args.model = str(locate(args.model))
    model = loaded(args)
    freeze(model)
    parts = find_parts(model)
    name, _, extra = method.partition("+")
    drawing = {"active": 2} if name in ("owlore", "lisa") else {}
    config, kind = resolve(TrainConfig.build({"method": name, "steps": 1, **drawing}))
    worst = np.zeros(parts.num_blocks)
    worst[[0, parts.num_blocks - 1]] = 1.0
    hyper = replace(strategy_config(config, None), inclusion=worst)
    plan = make_plan(spec_of_model(model), kind, hyper, policy=master_policy(config), batch=args.batch, accum=1,
                     tokens=args.tokens, recompute=bool(extra))  # fmt: skip
    strategy = kind(parts, hyper)
    optimizer = RotatingOptimizer(parts.parameters(range(parts.num_blocks), parts.groups), seed=0, layers=parts.modules)
    recompute = ActivationCheckpointing(parts.modules, enabled=bool(extra))
    backend = ResidentBackend(parts, optimizer, CausalLoss(model), torch.device("cpu"), recompute)
    batches = token_batches(args)
    before = resident()
    reset_peak()
    counter = live_bytes(model) if how == "counted" else None
    with (
        trimmed_heap(parts.modules, torch.device("cpu")),
        saved_tensors_in_arena(parts.modules, enabled=not extra and counter is None),
        counter or nullcontext(),
    ):
        rules = strategy.specs_at(0)
        optimizer.switch(rules, 0, between=lambda: backend.set_active(rules))
        for step in range(2):
            ids = batches[step]
            part = MicroBatch(input_ids=ids, labels=ids, num_trained=ids.numel() - len(ids))
            train_step(backend, optimizer, {0: part}, step=step, lr=1e-4, clip=1.0, seed=0)
    return {
        "planned": plan.bytes["total"] - plan.bytes["weights"],
        "planned_state": plan.bytes["masters"] + plan.bytes["optimizer"],
        "state": optimizer.held().total,
        "peak": peak() - before if counter is None else counter.peak,
    }


def live_bytes(model: Any) -> Any:
    """A dispatch mode that adds up the storages operators make, for as long as they live."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    class LiveBytes(TorchDispatchMode):
        now = peak = 0
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        seen: dict[int, int] = {}

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for tensor in tree_flatten(out)[0]:
                storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
                if storage is not None and storage._cdata not in self.own | self.seen.keys() and storage.nbytes():
                    self.seen[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, storage._cdata)
            return out

        def gone(self, key: int) -> None:
            self.now -= self.seen.pop(key, 0)

    return LiveBytes()


if __name__ == "__main__":
    main()

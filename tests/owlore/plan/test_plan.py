"""The plan: bytes of weights and state to the byte, the peak of a step within 15 %, nothing trained."""

import json
import re
import time
import weakref
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import FAMILIES, save_tiny, tiny_llama, tiny_models
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import owlore
from htsr.errors import OutOfMemory, UsageError
from owlore.activations.checkpointing import ActivationCheckpointing
from owlore.blocks import find_parts, freeze
from owlore.config import TrainConfig
from owlore.data.batches import MicroBatch
from owlore.optim import MasterPolicy, RotatingOptimizer, UpdateSpec
from owlore.plan.footprint import measure_footprint, saved_bytes
from owlore.plan.model_spec import spec_of_model
from owlore.plan.plan import make_plan, parked_bytes
from owlore.plan.planner import plan_from_config
from owlore.plan.resident import largest_arriving_bytes
from owlore.render import plan_text
from owlore.strategies import STRATEGIES, StrategyConfig
from owlore.training.loss import CausalLoss
from owlore.training.resident import ResidentBackend
from owlore.training.step import train_step

GROUPS = ("embeddings", "norm", "head")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators create, for as long as they live; the model's own do not count."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}
        self.own = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
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

    def _gone(self, key):
        self.now -= self.seen.pop(key, 0)


def hyper(blocks, drawn, *, always_on=(), rank=16):
    inclusion = np.zeros(blocks)
    inclusion[list(drawn)] = 1.0
    return StrategyConfig(
        seed=0,
        draw="exact",
        inclusion=inclusion,
        always_on=always_on,
        rank=rank,
        refresh=None,
        scale=1.0,
        weight_decay=0.0,
    )


CASES = {
    "owlore high": ("owlore", (4, 5), (), False, 1),
    "owlore low": ("owlore", (0, 5), (), False, 1),
    "owlore low, recomputed": ("owlore", (0, 5), (), True, 1),
    "owlore, accumulated": ("owlore", (1, 2, 5), (), False, 2),
    "lisa": ("lisa", (2, 5), GROUPS, False, 1),
    "galore": ("galore", tuple(range(6)), (), False, 1),
    "full": ("full", tuple(range(6)), GROUPS, False, 1),
    "full, accumulated": ("full", tuple(range(6)), GROUPS, False, 2),
    "full, recomputed and accumulated": ("full", tuple(range(6)), GROUPS, True, 2),
    "full, recomputed": ("full", tuple(range(6)), GROUPS, True, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_state_is_planned_to_the_byte_and_the_peak_within_fifteen_percent(case, dtype):
    method, drawn, always_on, recompute, accum = CASES[case]
    # Few tokens where gradients that stand between micro-batches have to show beside the activations.
    batch, tokens = (2, 24) if case.startswith("full") and accum > 1 else (6, 96)
    model = tiny_llama(blocks=6, width=64, hidden=160, vocab=512, dtype=dtype).train()
    freeze(model)
    parts = find_parts(model)
    settings = hyper(6, drawn, always_on=always_on)
    plan = make_plan(
        spec_of_model(model),
        STRATEGIES[method],
        settings,
        policy=MasterPolicy.MASTER,
        batch=batch,
        accum=accum,
        tokens=tokens,
        recompute=recompute,
    )
    strategy = STRATEGIES[method](parts, settings)
    optimizer = RotatingOptimizer(parts.parameters(range(6), parts.groups), seed=0)
    backend = ResidentBackend(
        parts,
        optimizer,
        CausalLoss(model),
        torch.device("cpu"),
        ActivationCheckpointing(parts.modules, enabled=recompute),
    )
    stream = torch.Generator().manual_seed(0)
    with LiveBytes(model) as live:
        rules = strategy.specs_at(0)
        optimizer.switch(rules, 0, between=lambda: backend.set_active(rules))
        for step in range(2):
            rows = [torch.randint(4, 500, (batch, tokens), generator=stream) for _ in range(accum)]
            parts = {
                index: MicroBatch(input_ids=ids, labels=ids, num_trained=ids.numel() - batch)
                for index, ids in enumerate(rows)
            }
            train_step(backend, optimizer, parts, step=step, lr=1e-4, clip=1.0, seed=0)
    held = optimizer.held()
    assert plan.bytes["masters"] == held.masters
    assert plan.bytes["optimizer"] == held.moments + held.projectors
    assert plan.bytes["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    planned = plan.bytes["total"] - plan.bytes["weights"]
    assert planned == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_a_family_are_counted_within_five_percent(family, packed):
    """Packed sequences too, whose mask each block may save in a form of its own."""
    model = tiny_models()[family]().train()
    footprint = measure_footprint(model.config, dtype=torch.float32, packed=packed)
    positions = torch.cat([torch.arange(37), torch.arange(63)]).expand(3, -1) if packed else None
    parts = find_parts(model)
    for drawn in ((2,), (0, 2), (1,)):
        freeze(model)
        for parameter in parts.parameters(drawn, ()).values():
            parameter.requires_grad_(True)
        ids = torch.randint(4, 60, (3, 100), generator=torch.Generator().manual_seed(0))
        kinds = [footprint.trained if i in drawn else footprint.frozen for i in range(min(drawn), 3)]
        planned = 3 * (footprint.outside(100) + sum(kind(100) for kind in kinds))
        assert planned == pytest.approx(saved_bytes(model, ids, positions), rel=0.05)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_products_out_changes_no_count(family, packed, attn, monkeypatch):
    config = tiny_models()[family]().config
    given = {"dtype": torch.bfloat16, "packed": packed, "attn": attn}
    found = measure_footprint(config, **given)
    monkeypatch.setattr("owlore.plan.footprint.Unmultiplied", nullcontext)
    assert found == measure_footprint(config, **given)


def test_the_blocks_of_a_seventy_billion_model_are_counted_in_seconds_and_without_their_memory():
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8)
    before, started = resident_pages(), time.process_time()
    footprint = measure_footprint(config, dtype=torch.bfloat16)
    assert time.process_time() - started < 20
    assert (resident_pages() - before) * 4096 < 500e6  # of 3.4 GB of weights in two blocks
    # A frozen block saves at least its norms' inputs, the rotated heads and the three of the gated product.
    assert footprint.frozen.linear > 2 * (3 * 28672 + 4 * 8192) and footprint.trained.linear > footprint.frozen.linear


def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_depth_and_shares_follow_the_table():
    model = tiny_llama(blocks=8)
    shape = spec_of_model(model)
    top = make_plan(
        shape,
        STRATEGIES["owlore"],
        hyper(8, (7,)),
        policy=MasterPolicy.MASTER,
        batch=1,
        accum=1,
        tokens=8,
        recompute=False,
    )
    assert top.backward_depth == {"expected": 1.0, "blocks": 8}
    total = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[7].parameters())
    assert top.trainable == {"per_step": pytest.approx(block / total), "always_on": 0.0}
    uniform = StrategyConfig(
        seed=0,
        draw="exact",
        inclusion=np.full(8, 2 / 8),
        always_on=(),
        rank=8,
        refresh=None,
        scale=1.0,
        weight_decay=0.0,
    )
    spread = make_plan(
        shape, STRATEGIES["owlore"], uniform, policy=MasterPolicy.MASTER, batch=1, accum=1, tokens=8, recompute=False
    )
    # Uniform draws of g among L blocks: the lowest is (L + 1) / (g + 1) from the bottom on average, counted from 1.
    assert spread.backward_depth["expected"] == pytest.approx(8 + 1 - 9 / 3, abs=0.15)


def test_the_compute_of_a_step_is_counted_by_matrices():
    model = tiny_llama(blocks=8)
    shape = spec_of_model(model)
    blocks = [sum(p.numel() for p in layer.parameters() if p.ndim > 1) for layer in model.model.layers]
    head, whole = model.lm_head.weight.numel(), sum(blocks)

    def of_full(method, drawn, *, always_on=(), recompute=False):
        made = make_plan(
            shape,
            STRATEGIES[method],
            hyper(8, drawn, always_on=always_on),
            policy=MasterPolicy.MASTER,
            batch=1,
            accum=1,
            tokens=8,
            recompute=recompute,
        )
        return made.compute["of_full"]

    parts = 3 * (whole + head)
    assert of_full("full", range(8), always_on=GROUPS) == pytest.approx(1.0)
    assert of_full("full", range(8), always_on=GROUPS, recompute=True) == pytest.approx((parts + whole) / parts)
    top = whole + blocks[7] + blocks[7] + 2 * head  # forward, back through the top block, its own gradient; the head
    assert of_full("owlore", (7,)) == pytest.approx(top / parts)
    deep = whole + whole + blocks[0] + blocks[7] + 2 * head
    assert of_full("owlore", (0, 7)) == pytest.approx(deep / parts)
    assert of_full("lisa", (7,), always_on=GROUPS) == pytest.approx((whole + whole + blocks[7] + 3 * head) / parts)


@pytest.mark.parametrize(
    ("dtype", "rank", "bytes_each"),
    [(torch.float32, None, 0), (torch.float32, 2, 4), (torch.bfloat16, None, 6), (torch.bfloat16, 2, 6)],
)
def test_a_gradient_counts_in_its_hook_where_it_is_copied_to_fp32_or_projected(dtype, rank, bytes_each):
    """A dense gradient in fp32 becomes the accumulated one; any other exists beside it, in 16 bits with a copy."""
    weight = torch.nn.Parameter(torch.zeros(8, 6, dtype=dtype))
    assert largest_arriving_bytes({"w": weight}, {"w": UpdateSpec(rank=rank)}) == bytes_each * weight.numel()


def test_parked_state_is_planned_to_the_byte():
    """--on-switch keep: once every block was drawn, what waits and what is active are what the plan says."""
    model = tiny_llama(blocks=4)
    freeze(model)
    parts = find_parts(model)
    uniform = StrategyConfig(
        seed=0,
        draw="exact",
        inclusion=np.full(4, 2 / 4),
        always_on=(),
        rank=8,
        refresh=None,
        scale=1.0,
        weight_decay=0.0,
    )
    strategy = STRATEGIES["owlore"](parts, uniform)
    optimizer = RotatingOptimizer(parts.parameters(range(4), ()), seed=0, on_switch="keep")
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    for period in range(12):
        optimizer.switch(strategy.specs_at(period), period)
        CausalLoss(model)(ids, ids).backward()
        optimizer.update(1e-3, None)
    planned = parked_bytes(spec_of_model(model), strategy, MasterPolicy.MASTER)
    assert planned == optimizer.parked_bytes() == optimizer.held().total  # two blocks wait, two are active


def test_advice_is_ranked_and_each_saving_is_what_the_plan_of_that_change_saves(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=4, width=64, hidden=160)
    settings = {
        "model": str(model),
        "active": 2,
        "rank": 32,
        "seq_len": 128,
        "always_on": "embeddings",
        "batch": 6,
        "on_switch": "keep",
        "table": "uniform",
    }
    plan = plan_from_config(TrainConfig.build(settings), lambda message: None, advice=True)
    savings = [piece.saves for piece in plan.advice]
    assert savings == sorted(savings, reverse=True) and min(savings) > 0
    found = {piece.change: piece.saves for piece in plan.advice}
    assert {"--batch 3 --accum 2", "--seq-len 64", "--state-bits 8", "--dtype bfloat16"} <= found.keys()
    changes = {
        "--checkpointing on": {"checkpointing": "on"},
        "--active 1": {"active": 1},
        "--always-on none": {"always_on": "none"},
        "--on-switch drop": {"on_switch": "drop"},
    }
    for change, settings_then in changes.items():
        other = plan_from_config(TrainConfig.build(settings | settings_then), lambda message: None)
        assert plan.bytes["total"] - other.bytes["total"] == found[change], change
    assert plan_text(plan.to_dict()).splitlines()[-len(savings)].split()[0] == plan.advice[0].change.split()[0]


def test_a_method_is_given_no_advice_that_it_does_not_read(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=3)
    plan = plan_from_config(
        TrainConfig.build({"model": str(model), "method": "full"}), lambda message: None, advice=True
    )
    words = " ".join(piece.change for piece in plan.advice)
    assert "--checkpointing" in words
    assert not any(option in words for option in ("--rank", "--active", "--on-switch"))


def test_out_of_memory_ends_with_the_breakdown_and_ranked_advice(tmp_path, monkeypatch):
    from owlore.training.trainer import Trainer

    advance = Trainer.train_step

    def failing(self):
        if self.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return advance(self)

    monkeypatch.setattr(Trainer, "train_step", failing)
    model = save_tiny(tmp_path / "model", blocks=4)
    rows = [{"prompt": "say ", "completion": "a" * 60}] * 8
    with pytest.raises(
        OutOfMemory, match=r"step 3: weights .* GB, masters .*planned savings, each alone: --"
    ) as caught:
        owlore.train(model, rows, table="uniform", steps=4, active=2, rank=8, out=tmp_path / "run")
    assert caught.value.exit_code == 3
    found = [float(x) for x in re.findall(r" (\d+\.\d+) GB \(", str(caught.value))]
    assert found == sorted(found, reverse=True) and 1 < len(found) <= 5


def test_a_plan_needs_the_configuration_alone(tmp_path, capsys):
    from htsr import console
    from owlore.cli import cli

    model = save_tiny(tmp_path / "model", blocks=4)
    (model / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as done:
        console.run(cli, ["plan", str(model), "--active", "2", "--rank", "8", "--json"])
    assert done.value.code == 0
    made = json.loads(capsys.readouterr().out)
    assert set(made["bytes"]) == {"weights", "masters", "gradients", "optimizer", "activations", "logits", "total"}
    assert set(made["trainable"]) == {"per_step", "always_on"}
    assert set(made["backward_depth"]) == {"expected", "blocks"}


def test_with_several_processes_each_gathers_whole_gradients_for_its_new_bases(tmp_path):
    settings = {"model": str(save_tiny(tmp_path / "model", blocks=4)), "active": 2, "rank": 8, "batch": 1, "seq_len": 4}

    def planned(accum, **several):
        config = TrainConfig.build(settings | {"accum": accum})
        return plan_from_config(config, lambda message: None, **several).bytes

    alone, accumulated = planned(1), planned(2)
    for processes in (2, 8):
        together = planned(1, processes=processes)
        assert together["gradients"] == accumulated["gradients"] > alone["gradients"]
        assert alone["total"] < together["total"] <= accumulated["total"]
        assert planned(2, processes=processes) == accumulated
    same = ("weights", "masters", "optimizer", "activations", "logits")
    assert all(together[kind] == alone[kind] for kind in same)
    with pytest.raises(UsageError, match="--processes"):
        plan_from_config(TrainConfig.build(settings | {"residency": "host"}), lambda message: None, processes=2)


def test_longer_rows_larger_batches_and_more_blocks_cost_more(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=4)

    def total(**settings):
        given = {"model": str(model), "active": 2, "rank": 8, "seq_len": 64, **settings}
        return plan_from_config(TrainConfig.build(given), lambda message: None).bytes["total"]

    usual = total()
    for more in ({"seq_len": 128}, {"batch": 8}, {"active": 4}, {"rank": "full"}, {"always_on": "embeddings"}):
        assert total(**more) > usual, more
    assert total(checkpointing="on") < usual

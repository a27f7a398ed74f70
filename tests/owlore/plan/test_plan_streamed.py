"""The plan of streamed and quantised runs: device bytes to the byte, peaks within 15 %, seconds, and --fit."""

import json
import weakref

import numpy as np
import pytest
import torch
from makers import save_tiny, tiny_llama
from streaming import Streamed, batches, deep_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from owlore.blocks import find_parts
from owlore.config import TrainConfig
from owlore.optim import MasterPolicy
from owlore.plan.fit import fit_from_config
from owlore.plan.model_spec import spec_of_model
from owlore.plan.plan import make_plan
from owlore.plan.planner import plan_from_config
from owlore.plan.streamed import StreamedModel
from owlore.plan.traffic import Rates
from owlore.residency.placement import Placement
from owlore.strategies import STRATEGIES, StrategyConfig

PLACEMENTS = {
    "host": Placement(residency="host"),
    "host nf4": Placement(residency="host", frozen="nf4"),
    "host int8, a quarter resident": Placement(residency="host", frozen="int8", resident_share=0.25),
    "device nf4": Placement(frozen="nf4"),
    "device, offloaded": Placement(offload=True),
    "host, offloaded": Placement(residency="host", offload=True),
}


def streamed_of(model, placement, **settings):
    blocks = len(model.model.layers)
    return Streamed(
        model, form=placement.frozen, resident=placement.resident_blocks(blocks), offload=placement.offload, **settings
    )


def storages(tensors):
    """Bytes of the distinct storages behind tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(("case", "drawn"), [*((case, (5, 6, 11)) for case in PLACEMENTS), ("host nf4", (0, 12))])
def test_device_bytes_of_twelve_and_more_blocks_are_planned_and_never_more_than_buffers_and_drawn(case, drawn):
    placement = PLACEMENTS[case]
    streamed = streamed_of(deep_llama(13, dtype=torch.bfloat16), placement)
    residency = streamed.residency
    planned = StreamedModel(find_parts(deep_llama(13, dtype=torch.bfloat16)), placement).device_bytes(drawn)
    seen = []

    def count(*_):
        """Every storage behind a block's parameters, the slots, and what the store keeps on the device."""
        blobs = [residency.store.blobs[b].tensor for b in residency.store.resident & residency.store.blobs.keys()]
        parameters = [p for module in streamed.parts.modules for p in module.parameters()]
        seen.append(storages([*parameters, *residency.device_buffers.buffers, *blobs]))

    for module in streamed.parts.modules:
        module.mlp.register_forward_hook(count)
    streamed.draw((3,))
    streamed.draw(drawn)
    streamed.take_step(batches(2))
    placeholder = 2 * sum(1 for module in streamed.parts.modules for _ in module.parameters())  # a NaN each
    assert residency.device_bytes() == planned
    assert len(seen) == 2 * (13 + 13 - min(drawn))
    assert sum(planned.values()) <= max(seen) <= sum(planned.values()) + placeholder
    whole = sum(p.numel() * 2 for module in streamed.parts.modules for p in module.parameters())
    if placement.residency == "host" and not placement.resident_share:
        own = whole // 13
        assert planned["resident"] == 0 and planned["drawn"] == len(drawn) * own
        assert max(seen) <= 2 * residency.store.layouts[0].num_bytes + len(drawn) * own + placeholder < 0.6 * whole


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators create, for as long as they live."""

    def __init__(self, before):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}
        self.before = {t.untyped_storage()._cdata for t in before}  # held before and all the time

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.seen and key not in self.before and storage.nbytes():
                    self.seen[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key):
        self.now -= self.seen.pop(key, 0)


def hyper(blocks, drawn, **settings):
    inclusion = np.zeros(blocks)
    inclusion[list(drawn)] = 1.0
    return StrategyConfig(
        **{
            "seed": 0,
            "draw": "exact",
            "inclusion": inclusion,
            "always_on": (),
            "rank": 8,
            "refresh": None,
            "scale": 1.0,
            "weight_decay": 0.0,
            **settings,
        }
    )


@pytest.mark.parametrize(("case", "accum"), [("host", 1), ("device nf4", 1), *((case, 3) for case in PLACEMENTS)])
def test_the_peak_is_planned_within_fifteen_percent(case, accum):
    placement, drawn = PLACEMENTS[case], (1, 6)
    # Blocks large beside one tensor's alignment, and a head small beside them.
    model = tiny_llama(blocks=8, width=64, hidden=160, vocab=128, dtype=torch.bfloat16).train()
    shape = spec_of_model(model)
    planned = make_plan(
        shape,
        STRATEGIES["owlore"],
        hyper(8, drawn),
        policy=MasterPolicy.MASTER,
        batch=2,
        accum=accum,
        tokens=64,
        recompute=True,
        placement=placement,
    )
    counted, streamed = counted_peak(model, placement, drawn, accum)
    assert planned.bytes["total"] == pytest.approx(counted, rel=0.15)
    held = streamed.optimizer.held()
    assert planned.bytes["masters"] == held.masters
    assert planned.bytes["optimizer"] == held.moments + held.projectors


ALL = ("embeddings", "norm", "head")


@pytest.mark.parametrize(
    ("tied", "groups", "accum", "rank"),
    [
        *((tied, ALL, accum, rank) for tied in (False, True) for accum in (1, 4) for rank in (8, None)),
        (False, ("embeddings",), 4, 8),
        (False, ("head",), 4, 8),
    ],
)
def test_so_is_it_with_trained_embeddings_and_head_that_outweigh_the_blocks(tied, groups, accum, rank):
    drawn = (1, 6)
    model = tiny_llama(blocks=8, width=64, hidden=96, vocab=2048, tied=tied, dtype=torch.bfloat16).train()
    planned = make_plan(
        spec_of_model(model),
        STRATEGIES["owlore"],
        hyper(8, drawn, always_on=groups, rank=rank, project_always_on=True),
        policy=MasterPolicy.MASTER,
        batch=2,
        accum=accum,
        tokens=64,
        recompute=True,
        placement=PLACEMENTS["host"],
    )
    counted, _ = counted_peak(
        model,
        PLACEMENTS["host"],
        drawn,
        accum,
        rank=rank,
        groups=("embeddings", "head") if tied else groups,
        reads=groups,
    )
    assert planned.bytes["total"] == pytest.approx(counted, rel=0.03)


def counted_peak(model, placement, drawn, accum, *, rank=8, groups=(), reads=()):
    """Most bytes that live in two steps, as a plan counts them, and the streamed side."""
    streamed = streamed_of(model, placement, rank=rank, groups=groups, landing="real")
    outside = sum(p.numel() * 2 for p in streamed.parts.parameters((), streamed.parts.groups).values())
    left = StreamedModel(streamed.parts, placement).outside_bytes(reads)[
        1
    ]  # the embedding: here it is in the same memory
    streamed.watches = False
    parts = fixed_batches(accum)
    blobs = [blob.tensor for blob in streamed.residency.store.blobs.values()]
    with LiveBytes([*blobs, *streamed.residency.device_buffers.buffers, *model.parameters()]) as live:
        streamed.draw(drawn)
        for _ in range(2):
            streamed.take_step(parts)
    standing = streamed.residency.device_bytes()["slots"] + streamed.residency.device_bytes()["resident"] + outside
    return live.peak + standing - left - streamed.boundaries.host_bytes(), streamed


def fixed_batches(count):
    from owlore.data.batches import MicroBatch

    stream = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 120, (2, 64), generator=stream) for _ in range(count)]
    return [MicroBatch(input_ids=i, labels=i, num_trained=2 * 63) for i in ids]


def test_host_bytes_are_those_of_the_run():
    placement = PLACEMENTS["host, offloaded"]
    streamed = streamed_of(deep_llama(6), placement)
    streamed.draw((2,))
    streamed.take_step(batches(1))
    boundary = batches(1)[0].input_ids.numel() * 16 * 4
    assert streamed.boundaries.host_bytes() == 4 * boundary
    assert streamed.residency.store.host_bytes() == sum(x.num_bytes for x in streamed.residency.store.layouts)


def seven_b(**settings):
    """Traffic of a Llama-2-7B shape from the configuration alone, without measuring a block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from owlore.plan.traffic import traffic

    with torch.device("meta"):
        parts = find_parts(LlamaForCausalLM(LlamaConfig(intermediate_size=11008)).to(torch.bfloat16))
    model = StreamedModel(parts, Placement(residency="host", **settings.pop("placement", {})))
    sizes = [sum(p.numel() for _, p in block) for block in parts.blocks]
    given = {"tokens": 512, "bottom": False, "recompute": True, "rates": Rates(), **settings}
    return traffic(model, [(0, 8, 16, 24, 31)], sizes, **given)


@pytest.mark.parametrize(
    ("flops", "bus", "expected"),
    [
        (70, 25, (2800, 1414, 722)),
        (165, 25, (6600, 3333, 1703)),
        (165, 50, (3300, 1667, 851)),
        (700, 50, (14000, 7070, 3612)),
    ],
)
def test_the_tokens_from_which_copies_are_hidden_are_the_references_table(flops, bus, expected):
    for form, tokens in zip(("bf16", "int8", "nf4"), expected, strict=True):
        found = seven_b(placement={"frozen": form}, rates=Rates(bus=bus * 1e9, flops=flops * 1e12))
        assert found.hidden_from == pytest.approx(tokens, rel=0.01)


def test_a_step_below_that_stalls_for_what_is_not_hidden():
    below, above = (seven_b(tokens=tokens) for tokens in (512, 8192))
    assert not below.hidden and below.stall_seconds > 0 and above.hidden and above.stall_seconds == 0
    assert below.loads == above.loads == 27 + 27 - 4 and below.bytes == above.bytes
    assert below.copy_seconds == pytest.approx(50 * 404.8e6 / 25e9, rel=1e-3)
    free = seven_b(rates=Rates(bus=1e15))
    assert free.stall_seconds == 0 and free.step_seconds == pytest.approx(below.compute_seconds)


def planned(directory, **settings):
    given = {"model": str(directory), "active": 2, "rank": 8, "seq_len": 32, **settings}
    return plan_from_config(TrainConfig.build(given), lambda message: None)


def test_the_command_says_what_lives_where_and_whether_copies_are_hidden(tmp_path, capsys):
    from htsr import console
    from owlore.cli import cli

    model = save_tiny(tmp_path / "model", blocks=12, width=64, hidden=160)

    def run(*options):
        with pytest.raises(SystemExit) as done:
            console.run(cli, ["plan", str(model), "--active", "2", "--seq-len", "32", *options])
        return done.value.code, capsys.readouterr()

    code, out = run("--residency", "host", "--json", "--bus", "1", "--tflops", "100")
    made = json.loads(out.out)
    assert code == 0 and made["host"]["store"] > 0 and made["step"]["loads"] > 0
    assert made["step"]["bus_gb_s"] == 1 and made["step"]["tflops"] == 100 and not made["step"]["measured"]
    assert set(made["bytes"]) == {"weights", "masters", "gradients", "optimizer", "activations", "logits", "total"}
    assert made["bytes"]["weights"] < planned(model).bytes["weights"] / 2
    code, out = run("--residency", "host", "--bus", "1", "--tflops", "100")
    assert "in host memory" in out.out and "not hidden" in out.out and "assumed: 100 TFLOP/s, 1 GB/s" in out.out
    for wrong in ("much", "8", "8XB", "0GB"):
        code, out = run("--fit", wrong)
        assert code == 2 and "8GB" in out.err


def test_fit_leaves_bits_alone_where_it_can_and_quantises_last(tmp_path):
    model = save_tiny(tmp_path / "model", blocks=12, width=64, hidden=160, dtype=torch.bfloat16)
    given = {"model": str(model), "active": 2, "rank": 8, "seq_len": 16, "batch": 2}

    def fit(limit, **more):
        return fit_from_config(TrainConfig.build(given | more), limit, lambda message: None, Rates(bus=1e9))

    plain = planned(model, seq_len=16, batch=2).bytes["total"]
    enough = fit(plain)
    assert enough.fits and enough.changes == {} and enough.level == 0
    least = fit(1)
    assert not least.fits and least.level == 2
    smallest, levels = least.plan.bytes["total"], [0]
    for share in (0.6, 0.0):
        limit = int(smallest + share * (plain - smallest))
        found = fit(limit)
        assert found.fits and found.plan.bytes["total"] <= limit
        again = plan_from_config(TrainConfig.build(given | found.changes), lambda message: None)
        assert again.bytes == found.plan.bytes  # the options that are named give that plan
        levels.append(found.level)
    assert levels == sorted(levels) and levels[-1] == 2 and smallest < plain / 2
    kept = fit(smallest, frozen="bf16", residency="device")
    assert "frozen" not in kept.changes and "residency" not in kept.changes  # what was given stays

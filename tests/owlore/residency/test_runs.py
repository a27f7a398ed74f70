"""Whole runs whose blocks are streamed or quantised: the same bits, exports, resumes, and bytes as planned."""

import pytest
import torch
from makers import save_tiny, tiny_models
from safetensors.torch import load_file
from streaming import SHAPES

import owlore

ROWS = [{"prompt": f"the {a} and {b}: ", "completion": f"{b}, {a}."} for a in "abcdefg" for b in "mno"]
SETTINGS = {"steps": 20, "every": 4, "active": 2, "rank": 4, "batch": 2, "accum": 2, "lr": 5e-3, "table": "uniform",
            "eval_data": 0.2, "seed": 3}  # fmt: skip
ROW = ["step", "split", "loss", "lr", "grad_norm", "tokens", "state_bytes", "active_blocks"]


def exported(run):
    return load_file(run.directory / "model/model.safetensors")


def same(a, b):
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def tiny(directory, family, dtype=torch.float32):
    return save_tiny(directory, tiny_models()[family]().to(dtype))


HOST = {"residency": "host"}
SHARED = {"residency": "host", "offload_activations": True, "resident_share": 0.34}
CASES = {
    **{f"{family}, host": (family, torch.float32, HOST) for family in SHAPES},
    "llama in bf16, host": ("llama", torch.bfloat16, HOST),
    "llama, host, offloaded, a share resident": ("llama", torch.float32, SHARED),
    "llama, device, offloaded": ("llama", torch.float32, {"offload_activations": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_streamed_steps_over_five_draws_are_the_resident_ones_bit_for_bit(tmp_path, case):
    family, dtype, extra = CASES[case]
    model = tiny(tmp_path / "model", family, dtype)
    plain = owlore.train(model, ROWS, out=tmp_path / "device", **SETTINGS)
    host = owlore.train(model, ROWS, out=tmp_path / "host", **SETTINGS, **extra)
    assert plain.history[ROW].to_json() == host.history[ROW].to_json()
    assert len({tuple(blocks) for blocks in plain.history["active_blocks"]}) > 2
    assert same(exported(plain), exported(host))
    assert same(*(load_file(r.directory / "checkpoints/step-000020/optimizer.safetensors") for r in (plain, host)))
    assert same(plain.model.state_dict(), host.model.state_dict())

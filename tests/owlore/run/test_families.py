"""Every family of models, found by structure: it trains with all groups on, resumes and exports."""

import pytest
import torch
from makers import FAMILIES, save_tiny, tiny_models
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import owlore

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]
SETTINGS = {
    "table": "uniform", "steps": 6, "every": 2, "active": 1, "rank": 8, "batch": 4, "accum": 2, "lr": 1e-2,
    "save_every": 3, "checkpointing": "on", "draw": "cyclic", "eval_data": 0.25, "group_by_length": True,
}  # fmt: skip


@pytest.mark.parametrize("always_on", ["none", "embeddings,norm,head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_resumes_and_exports(tmp_path, family, always_on):
    model = save_tiny(tmp_path / "model", tiny_models()[family]())
    settings = SETTINGS | {"always_on": always_on}
    run = owlore.train(model, ROWS, out=tmp_path / "run", **settings)
    assert run.record["loss"] == "chunked"
    assert run.record["eval_loss_last"] < run.record["eval_loss_first"]
    assert run.record["draws"] == [1, 1, 1]

    place = tmp_path / "run/checkpoints/step-000003"
    again = owlore.train(model, ROWS, out=tmp_path / "again", resume=str(place), **settings)
    before, a, b = (
        load_file(d / "model.safetensors") for d in (model, tmp_path / "run/model", tmp_path / "again/model")
    )
    assert before.keys() == a.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [r["loss"] for r in run.rows if r["step"] > 3] == [r["loss"] for r in again.rows if r["step"] > 3]

    inside = {name for block in _units(run.model).blocks for name, _ in block}
    for name, tensor in before.items():
        if name not in inside and always_on == "none":
            assert torch.equal(tensor, a[name]), name
        elif tensor.ndim == 2:
            assert not torch.equal(tensor, a[name]), name
    plain = AutoModelForCausalLM.from_pretrained(run.directory / "model")
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, run.model(ids).logits)


def _units(model):
    from owlore.blocks import find_parts

    return find_parts(model)

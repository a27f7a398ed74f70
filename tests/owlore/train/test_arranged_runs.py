"""Runs whose rows are grouped or packed: same rows, same loss, exact resume."""

import pytest
import torch
from makers import save_tiny
from safetensors.torch import load_file

import owlore

ROWS = [{"prompt": f"the {a * n}: ", "completion": f"{a}, " * n} for a in "abcdefg" for n in (1, 3, 6)]
SETTINGS = {
    "epochs": 2, "every": 2, "active": 2, "rank": 8, "batch": 2, "accum": 2, "lr": 5e-3, "schedule": "constant",
    "table": "uniform", "seq_len": 96,
}  # fmt: skip


def weights_of(run):
    return load_file(run.directory / "model/model.safetensors")


@pytest.mark.parametrize("option", ["group_by_length"])
def test_an_arranged_run_goes_on_bit_for_bit_and_shows_every_token(tmp_path, option):
    model = save_tiny(tmp_path / "model", attention_dropout=0.1)
    settings = SETTINGS | {option: True}
    whole = owlore.train(model, ROWS, out=tmp_path / "whole", **settings)
    plain = owlore.train(model, ROWS, out=tmp_path / "plain", **SETTINGS)
    assert whole.record["tokens"] == plain.record["tokens"]
    assert whole.history["tokens"].tolist() != plain.history["tokens"].tolist()
    owlore.train(model, ROWS, out=tmp_path / "cut", **{**settings, "epochs": None, "steps": 3})
    resumed = owlore.train(model, ROWS, out=tmp_path / "cut", resume=True, **settings)
    assert all(torch.equal(tensor, weights_of(resumed)[name]) for name, tensor in weights_of(whole).items())
    exact = ["step", "epoch", "loss", "tokens", "active_blocks"]
    assert whole.history[exact].to_json() == resumed.history[exact].to_json()
    assert resumed.history["epoch"].iloc[-1] == 2.0

"""--keep-best: the weights of the best evaluation survive what is trained later, and a resume changes nothing."""

import json

import pytest
import torch
from makers import save_tiny
from safetensors.torch import load_file

import owlore
from htsr.errors import NotFound
from owlore.io import checkpoint
from owlore.training.trainer import Trainer

ROWS = [{"prompt": f"the {a} and {b}: ", "completion": f"{b}, {a}."} for a in "abcdefg" for b in "mno"]
# One block a period of two steps: blocks are drawn after the best step that were never trained before it.
SETTINGS = {
    "steps": 12, "every": 2, "active": 1, "rank": 8, "batch": 4, "lr": 2e-2, "schedule": "constant", "keep": 2,
    "table": "uniform", "eval_data": 0.2, "eval_every": 2, "draw": "cyclic", "keep_best": True, "save_every": 3,
}  # fmt: skip
WORST = {0: 9.0, 2: 3.0, 4: 1.0, 6: 2.0, 8: 3.0, 10: 4.0, 12: 5.0}  # what evaluations notify: step 4 is the best


@pytest.fixture
def judged(monkeypatch):
    """Held-out losses by step as in `WORST`; the weights at each evaluation are kept in the returned dict."""
    seen = {}
    evaluate = Trainer.evaluate

    def planted(self):
        monkeypatch.setattr("owlore.training.trainer.held_out_loss", lambda *_, **__: WORST[self.step])
        seen[self.step] = {name: tensor.clone() for name, tensor in self.parts.model.state_dict().items()}
        return evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", planted)
    return seen


def weights_of(run):
    return load_file(run.directory / "model/model.safetensors")


def power_cut():
    raise RuntimeError("power cut")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_of_the_best_evaluation_is_exported_bit_for_bit(tmp_path, judged, dtype):
    model = save_tiny(tmp_path / "model", blocks=6, dtype=getattr(torch, dtype))
    run = owlore.train(model, ROWS, out=tmp_path / "run", **SETTINGS)
    assert same(weights_of(run), judged[4])
    assert same(dict(run.model.state_dict()), judged[4])
    assert not same(judged[12], judged[4])
    assert run.record["eval_best"] == {"step": 4, "loss": 1.0}
    assert (run.record["exported_step"], run.record["eval_loss_last"]) == (4, 5.0)
    names = [path.name for path in checkpoint.complete(run.directory / "checkpoints")]
    assert names == ["step-000004", "step-000009", "step-000012"]
    assert "step 4" in (run.directory / "README.md").read_text()


def test_without_the_option_the_last_model_is_exported_and_the_best_is_said(tmp_path, judged):
    model = save_tiny(tmp_path / "model", blocks=6)
    run = owlore.train(model, ROWS, out=tmp_path / "run", **SETTINGS | {"keep_best": False})
    assert same(weights_of(run), judged[12])
    assert run.record["eval_best"] == {"step": 4, "loss": 1.0} and run.record["exported_step"] == 12
    names = [path.name for path in checkpoint.complete(run.directory / "checkpoints")]
    assert names == ["step-000009", "step-000012"]


@pytest.mark.parametrize("stop", [3, 4, 8])
def test_a_resume_before_at_and_after_the_best_changes_nothing(tmp_path, judged, monkeypatch, stop):
    model = save_tiny(tmp_path / "model", blocks=6, attention_dropout=0.1)
    whole = owlore.train(model, ROWS, out=tmp_path / "whole", **SETTINGS)
    advance = Trainer.train_step
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(Trainer, "train_step", lambda self: power_cut() if self.step == stop else advance(self))
        owlore.train(model, ROWS, out=tmp_path / "cut", **SETTINGS)
    resumed = owlore.train(model, ROWS, out=tmp_path / "cut", resume=True, **SETTINGS)
    assert same(weights_of(whole), weights_of(resumed))
    assert whole.record["draws"] == resumed.record["draws"]
    states = [
        json.loads((run.directory / "checkpoints/step-000012/state.json").read_text()) for run in (whole, resumed)
    ]
    assert states[0]["trained"] == states[1]["trained"]
    for name in ("weights", "optimizer"):
        assert same(*(load_file(r.directory / f"checkpoints/step-000012/{name}.safetensors") for r in (whole, resumed)))


def test_a_best_checkpoint_that_is_gone_is_said_at_the_start(tmp_path, judged):
    model = save_tiny(tmp_path / "model", blocks=6)
    owlore.train(model, ROWS, out=tmp_path / "run", **SETTINGS | {"steps": 6})
    with pytest.raises(NotFound, match="step 4"):
        named = str(tmp_path / "run/checkpoints/step-000006")
        owlore.train(model, ROWS, out=tmp_path / "other", resume=named, **SETTINGS)
    assert not (tmp_path / "other").exists()

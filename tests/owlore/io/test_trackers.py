"""Trackers get every metrics row when asked for, and are not even imported otherwise."""

import sys
import types
from importlib.machinery import ModuleSpec

import pytest
from makers import save_tiny

import owlore
from htsr.errors import UsageError
from owlore.io.trackers import numbers

ROWS = [{"prompt": f"the {a} and {b}: ", "completion": f"{b}, {a}."} for a in "abcd" for b in "mno"]
SETTINGS = {"steps": 3, "batch": 2, "rank": 8, "active": 1, "table": "uniform", "eval_data": 0.2, "eval_every": 2}


@pytest.fixture
def wandb(monkeypatch):
    """A module that records what the real one would be told."""
    module = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.told, module.ended = [], 0

    def finish():
        module.ended += 1

    def init(**settings):
        module.settings = settings
        return types.SimpleNamespace(log=lambda values, step: module.told.append((step, values)), finish=finish)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_every_row_is_forwarded_with_its_step(tmp_path, wandb):
    run = owlore.train(save_tiny(tmp_path / "model"), ROWS, out=tmp_path / "run", log_to="wandb", **SETTINGS)
    assert wandb.told == [(row["step"], numbers(row)) for row in run.rows]
    assert [step for step, _ in wandb.told] == [0, 1, 2, 2, 3, 3]
    assert wandb.told[1][1]["train/loss"] == run.rows[1]["loss"] and "eval/loss" in wandb.told[0][1]
    assert wandb.settings["mode"] == "offline" and wandb.settings["config"]["steps"] == 3
    assert wandb.ended == 1


def test_the_environment_alone_lets_a_run_go_online(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    owlore.train(save_tiny(tmp_path / "model"), ROWS, out=tmp_path / "run", log_to="wandb", **SETTINGS)
    assert wandb.settings["mode"] == "online"


def test_a_tracker_is_closed_when_the_run_fails(tmp_path, wandb, monkeypatch):
    def fail(self):
        raise RuntimeError("power cut")

    monkeypatch.setattr("owlore.training.trainer.Trainer.train_step", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        owlore.train(save_tiny(tmp_path / "model"), ROWS, out=tmp_path / "run", log_to="wandb", **SETTINGS)
    assert wandb.ended == 1 and not (tmp_path / "run").exists()


def test_without_the_option_nothing_is_told(tmp_path, wandb):
    owlore.train(save_tiny(tmp_path / "model"), ROWS, out=tmp_path / "run", **SETTINGS)
    assert wandb.told == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_said_with_the_cure(tmp_path, monkeypatch, name):
    monkeypatch.setattr("owlore.io.trackers.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=rf"--log-to {name}.*htsr-owlore\[track\]"):
        owlore.train(tmp_path / "gone", ROWS, out=tmp_path / "run", log_to=name, **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_what_is_null_or_no_number_is_not_sent():
    row = {"step": 3, "epoch": 0.5, "split": "eval", "loss": 1.25, "lr": None, "active_blocks": [1, 2]}
    assert numbers(row) == {"eval/epoch": 0.5, "eval/loss": 1.25}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own imports
def test_event_files_hold_the_losses(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra track is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = owlore.train(save_tiny(tmp_path / "model"), ROWS, out=tmp_path / "run", log_to="tensorboard", **SETTINGS)
    events = EventAccumulator(str(run.directory / "tensorboard"))
    events.Reload()
    for split in ("train", "eval"):
        expected = [(row["step"], row["loss"]) for row in run.rows if row["split"] == split]
        assert [(e.step, e.value) for e in events.Scalars(f"{split}/loss")] == [
            (step, pytest.approx(loss, rel=1e-6)) for step, loss in expected
        ]

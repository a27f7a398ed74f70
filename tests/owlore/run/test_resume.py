"""Twelve steps are five, a SIGKILL, and a resume: bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from makers import save_tiny
from safetensors.torch import load_file

import owlore
from htsr.errors import BadInput, Interrupted, NotFound, UsageError

ROOT = Path(__file__).parents[3]
ROWS = [{"prompt": f"the {a} and {b}: ", "completion": f"{b}, {a}."} for a in "abcdefg" for b in "mno"]
SETTINGS = {
    "steps": 12, "every": 4, "active": 2, "rank": 8, "batch": 2, "accum": 3, "lr": 5e-3, "save_every": 5, "keep": 5,
    "eval_data": 0.2, "refresh": 3, "seed": 3,
}  # fmt: skip

# Slow after the checkpoint, so that the kill arrives inside step 7, between two micro-batches or in an update.
# One process that has loaded the libraries divides itself into one for each model.
CHILD = """
import json, os, sys, time
import owlore, owlore.run.api, transformers
from owlore.training.trainer import Trainer
advance = Trainer.train_step
def slow(self):
    row = advance(self)
    if self.step >= 6:
        time.sleep(600)  # until it is killed, however busy the machine is
    return row
Trainer.train_step = slow
rows, settings, models = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
place = models[0] if os.fork() else models[1]
owlore.train(place + "/model", rows, out=place + "/killed", table="uniform", **settings)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of a model and of a run in another process that was killed after step 6 (the checkpoint is of step 5)."""
    places = {dtype: tmp_path_factory.mktemp(dtype) for dtype in ("float32", "bfloat16")}
    for dtype, place in places.items():
        save_tiny(place / "model", blocks=5, attention_dropout=0.1, dtype=getattr(torch, dtype))
    command = [sys.executable, "-c", CHILD, json.dumps(ROWS), json.dumps(SETTINGS), *map(str, places.values())]
    child = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True
    )
    waiting = [place / "killed/metrics.jsonl" for place in places.values()]
    deadline = time.monotonic() + 300
    try:
        while waiting and time.monotonic() < deadline and child.poll() is None:
            waiting = [path for path in waiting if not path.exists() or '"step": 6' not in path.read_text()]
            time.sleep(0.05)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not waiting, "no sixth step after five minutes, or a run ended by itself"
    return places


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_run_goes_on_bit_for_bit(killed, one_thread, pictures, dtype):
    place = killed[dtype]
    whole = owlore.train(place / "model", ROWS, table="uniform", out=place / "whole", **SETTINGS)
    assert not (place / "killed/model").exists()
    assert [p.name for p in sorted((place / "killed/checkpoints").iterdir())] == ["step-000005"]

    resumed = owlore.train(place / "model", ROWS, table="uniform", out=place / "killed", resume=True, **SETTINGS)

    for name in ("weights", "optimizer"):
        expected, found = (load_file(r / f"checkpoints/step-000012/{name}.safetensors")
                           for r in (whole.directory, resumed.directory))  # fmt: skip
        assert expected.keys() == found.keys() and expected
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
    expected, found = (load_file(r.directory / "model/model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert whole.record["draws"] == resumed.record["draws"]
    exact = ["step", "epoch", "split", "loss", "lr", "grad_norm", "tokens", "state_bytes", "active_blocks"]
    assert whole.history[exact].to_json() == resumed.history[exact].to_json()
    assert [r["step"] for r in resumed.rows if r["split"] == "train"] == list(range(1, 13))


def test_a_finished_run_can_be_made_longer_from_a_named_checkpoint(tmp_path):
    model = save_tiny(tmp_path / "model")
    settings = {**SETTINGS, "schedule": "constant"}
    whole = owlore.train(model, ROWS, table="uniform", out=tmp_path / "whole", **settings)
    owlore.train(model, ROWS, table="uniform", out=tmp_path / "short", **{**settings, "steps": 5})
    longer = owlore.train(
        model, ROWS, table="uniform", resume=str(tmp_path / "short/checkpoints/step-000005"), **settings
    )
    assert longer.directory == tmp_path / "short"
    expected, found = (load_file(r.directory / "model/model.safetensors") for r in (whole, longer))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_run_directory_is_not_overwritten_and_a_resume_needs_the_same_run(tmp_path):
    model = save_tiny(tmp_path / "model")
    out = tmp_path / "run"
    run = owlore.train(model, ROWS, table="uniform", out=out, **SETTINGS)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="--resume"):
        owlore.train(model, ROWS, table="uniform", out=out, **SETTINGS)
    for change, match in (({"lr": 1e-3}, "lr is 0.001"), ({"seed": 4}, "seed"), ({"rank": 4}, "rank")):
        with pytest.raises(UsageError, match=match):
            owlore.train(model, ROWS, table="uniform", out=out, resume=True, **{**SETTINGS, **change})
    with pytest.raises(UsageError, match="data differ"):
        owlore.train(model, ROWS[1:], table="uniform", out=out, resume=True, **SETTINGS)
    with pytest.raises(UsageError, match="weights differ"):
        owlore.train(run.directory / "model", ROWS, table="uniform", out=out, resume=True, **SETTINGS)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_only_complete_checkpoints_count(tmp_path):
    model = save_tiny(tmp_path / "model")
    out = tmp_path / "run"
    with pytest.raises(NotFound, match="nothing to resume"):
        owlore.train(model, ROWS, table="uniform", out=out, resume=True, **SETTINGS)
    owlore.train(model, ROWS, table="uniform", out=out, **SETTINGS)
    last = out / "checkpoints/step-000012"
    (last / "COMPLETE").unlink()
    with pytest.raises(BadInput, match="not a complete checkpoint"):
        owlore.train(model, ROWS, table="uniform", resume=str(last), **SETTINGS)
    resumed = owlore.train(model, ROWS, table="uniform", out=out, resume=True, **SETTINGS)
    assert resumed.record["steps"] == 12
    assert (last / "COMPLETE").is_file()


def test_a_damaged_checkpoint_is_named(tmp_path):
    model = save_tiny(tmp_path / "model")
    out = tmp_path / "run"
    owlore.train(model, ROWS, table="uniform", out=out, **SETTINGS)
    file = out / "checkpoints/step-000012/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadInput, match="step-000012 cannot be read"):
        owlore.train(model, ROWS, table="uniform", out=out, resume=True, **SETTINGS)


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on(tmp_path, signal_name):
    from owlore.training.trainer import Trainer

    model = save_tiny(tmp_path / "model")
    whole = owlore.train(model, ROWS, table="uniform", out=tmp_path / "whole", **SETTINGS)
    advance = Trainer.train_step

    def interrupting(self):
        if self.step == 6:
            os.kill(os.getpid(), getattr(signal, signal_name))
        return advance(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupting)
        with pytest.raises(Interrupted, match="step 7") as caught:
            owlore.train(model, ROWS, table="uniform", out=tmp_path / "run", **SETTINGS)
    assert caught.value.exit_code == 130
    resumed = owlore.train(model, ROWS, table="uniform", out=tmp_path / "run", resume=True, **SETTINGS)
    expected, found = (load_file(r.directory / "model/model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(expected[key], found[key]) for key in expected)

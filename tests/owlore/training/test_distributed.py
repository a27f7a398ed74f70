"""Two processes on the loopback interface (gloo) are one process with twice the batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from makers import save_tiny
from safetensors.torch import load_file

import owlore
from htsr.errors import UsageError
from owlore.training.distributed import ALONE, join

ROOT = Path(__file__).parents[3]
ROWS = [{"prompt": f"the {a} and {b}: ", "completion": f"{b}, {a}." * n}
        for a in "abcdefg" for b, n in zip("mno", (1, 2, 4), strict=True)]  # fmt: skip
COMMON = {"table": "uniform", "lr": 1e-3, "seed": 3, "schedule": "constant"}
# 21 rows: the last step of an epoch has one row, so one of the processes has none.
CASES = {
    "projected": {
        "steps": 6,
        "every": 3,
        "active": 2,
        "rank": 8,
        "refresh": 2,
        "batch": 2,
        "accum": 2,
        "eval_data": 0.2,
        "eval_every": 3,
    },
    "an epoch": {"epochs": 1, "every": 2, "active": 2, "rank": 8, "batch": 2},
    "everything": {"method": "full", "table": None, "steps": 3, "batch": 3},
    "packed": {"steps": 2, "every": 2, "active": 2, "rank": 8, "batch": 1, "packing": True, "seq_len": 96},
}

CHILD = """
import json, os, sys, torch
import owlore
import owlore.run.lifecycle
from htsr.errors import HtsrError
torch.set_num_threads(1)
owlore.run.lifecycle.save_plots = lambda run: None  # they only take time here
root, rows, cases = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
for name, settings in cases.items():
    run = owlore.train(f"{root}/model", rows, out=f"{root}/two {name}", **settings)
    assert run.leads == (os.environ["RANK"] == "0")
longer = cases["projected"]
owlore.train(f"{root}/model", rows, out=f"{root}/two resumed", **{**longer, "steps": 3})
owlore.train(f"{root}/model", rows, out=f"{root}/two resumed", resume=True, **longer)
try:
    owlore.train(f"{root}/model", rows, out=f"{root}/astray", **{**longer, "seed": int(os.environ["RANK"])})
except HtsrError as error:
    open(f"{root}/error-{os.environ['RANK']}", "w").write(str(error))
"""


def settings_of(name, **change):
    return {key: value for key, value in (COMMON | CASES[name] | change).items() if value is not None}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes have trained every case."""
    root = tmp_path_factory.mktemp("ranks")
    save_tiny(root / "model", blocks=4, attention_dropout=0.1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    cases = json.dumps({name: settings_of(name) for name in CASES})
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(root), json.dumps(ROWS), cases], cwd=ROOT, stderr=subprocess.PIPE,
            text=True, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outcomes = [(child.communicate(timeout=180)[1], child.returncode) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    for _, code in outcomes:
        assert code == 0, "\n".join(e[-2500:] for e, _ in outcomes)
    return root


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_the_same_run(one, directory, start):
    ours = rows_of(directory)
    # Adam magnifies rounding where a gradient is near zero, and a gradient's norm shows it before the loss does.
    for key, rel in (("step", 0), ("epoch", 0), ("active_blocks", 0), ("tokens", 0), ("state_bytes", 0),
                     ("loss", 1e-5), ("grad_norm", 1e-4)):  # fmt: skip
        a, b = ([row[key] for row in rows if row[key] is not None] for rows in (one.rows, ours))
        assert a == (pytest.approx(b, rel=rel) if rel else b), key
    places = (one.directory / "model", directory / "model", start)
    a, b, before = (load_file(place / "model.safetensors") for place in places)
    # Rounding turns the axes of a basis where singular values are close, and Adam's first step is a sign: weights as a
    # whole agree to a part of how far they went, without projection much more closely.
    apart, moved = (sum(float((a[name] - c[name]).square().sum()) ** 0.5 for name in a) for c in (b, before))
    assert apart <= (1e-3 if one.record["config"]["method"] == "full" else 0.05) * moved
    record = json.loads((directory / "run.json").read_text())
    assert record["processes"] == 2 and record["draws"] == one.record["draws"]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_that_accumulates_twice_as_much(tmp_path, two, name):
    """Dropout too: a micro-batch has the same random numbers in whichever process."""
    settings = settings_of(name)
    settings["accum"] = 2 * settings.get("accum", 1)
    one = owlore.train(two / "model", ROWS, out=tmp_path / "one", **settings)
    assert_the_same_run(one, two / f"two {name}", two / "model")


def test_two_processes_are_one_with_twice_the_batch(tmp_path, tmp_path_factory, two):
    # Without dropout; its masks depend on the shape of a batch.
    plain = save_tiny(tmp_path / "plain", blocks=4)
    settings = settings_of("everything")
    single = owlore.train(plain, ROWS, out=tmp_path / "single", **settings | {"batch": 6})
    halves = owlore.train(plain, ROWS, out=tmp_path / "halves", **settings | {"accum": 2})
    assert [r["loss"] for r in single.rows] == pytest.approx([r["loss"] for r in halves.rows], rel=1e-5)


def test_a_resumed_run_of_two_processes_goes_on_bit_for_bit(two):
    a, b = (load_file(two / name / "model/model.safetensors") for name in ("two projected", "two resumed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [r["loss"] for r in rows_of(two / "two projected") if r["split"] == "train"] == [
        r["loss"] for r in rows_of(two / "two resumed") if r["split"] == "train"
    ]


def test_processes_that_were_started_differently_find_out_before_a_step(two):
    for rank in range(2):
        assert "settings differ between the processes" in (two / f"error-{rank}").read_text()
    assert not (two / "astray").exists()


def test_a_resume_with_another_number_of_processes_is_refused(two):
    with pytest.raises(UsageError, match="number of processes"):
        owlore.train(two / "model", ROWS, out=two / "two projected", resume=True, **settings_of("projected"))


def test_without_torchrun_a_process_is_alone_and_half_an_environment_is_refused(monkeypatch):
    assert join("cpu") is ALONE and ALONE.totals(2.5) == [2.5] and not ALONE.any(False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="RANK is not set: start the processes with torchrun"):
        join("cpu")

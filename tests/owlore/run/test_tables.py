"""From `htsr table` to the run: rule, direction, temperature and floor decide what is drawn."""

import json

import numpy as np
import paper
import pytest
from click.testing import CliRunner
from makers import save_tiny

import htsr
import owlore
from htsr.cli import cli
from htsr.errors import BadInput, UsageError
from owlore.layer_table import run_inclusion

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2)]


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """A tiny model with a scan on disk, LOD included."""
    root = tmp_path_factory.mktemp("scanned")
    model = save_tiny(root / "model", blocks=5)
    text = root / "text.txt"
    text.write_text("the son of the man said unto him, where is the ark of the man? " * 20)
    htsr.scan(model, calibration=text, tau=3, seq_len=32, samples=4, out=root / "scan", plots=False, quiet=True)
    return root


RULES = {
    "lod": lambda b: b["lod"],
    "alpha": lambda b: 1 / b["alpha"],
    "alpha light": lambda b: b["alpha"],
    "uniform": lambda b: np.ones(5),
    "decrease": lambda b: np.arange(5, 0, -1.0),
    "increase": lambda b: np.arange(1, 6.0),
    "reverse": lambda b: b["lod"].max() + b["lod"].min() - b["lod"],
    "norm": lambda b: np.sqrt(10 ** b["log10_norm"]),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_table_of_every_rule_reaches_the_draws(scanned, tmp_path, rule):
    name, *light = rule.split()
    settings = ["--rule", name, "--gamma", "3", "--temperature", "2", "--floor", "0.15"]
    settings += ["--direction", light[0]] if light else []
    file = tmp_path / "table.json"
    done = CliRunner().invoke(cli, ["table", str(scanned / "scan"), *settings, "-o", str(file)])
    assert done.exit_code == 0, done.output
    blocks = htsr.load_scan(scanned / "scan").blocks
    scores = np.asarray(RULES[rule](blocks), dtype=float) ** 0.5
    run = owlore.train(scanned / "model", ROWS, table=file, steps=2, every=1, active=2, rank=4, out=tmp_path / "run")
    assert run.record["inclusion"] == pytest.approx(paper.water_filling(scores.tolist(), 2, 0.15), abs=1e-9)
    assert run.record["table"]["rule"]["name"] == name
    assert sum(run.record["draws"]) == 4
    assert json.loads((tmp_path / "run/table.json").read_text())["rule"]["floor"] == 0.15


def test_a_runs_own_floor_replaces_the_tables_and_one_that_cannot_be_is_refused():
    table = htsr.LayerTable.build([5.0, 1.0, 1.0, 0.1], 2, floor=0.4)
    assert run_inclusion(table, active=None, floor=None).min() == pytest.approx(0.4)
    assert run_inclusion(table, active=None, floor=0.0).min() < 0.1
    assert run_inclusion(table, active=3, floor=None).min() == pytest.approx(0.4)
    with pytest.raises(UsageError, match=r"floor 0.4 and 1 of 4 blocks.*--floor"):
        run_inclusion(table, active=1, floor=None)
    broken = htsr.LayerTable.build([1.0, 1.0], 1, rule={"name": "given"})
    broken.rule["floor"] = "high"
    with pytest.raises(BadInput, match="floor 'high'"):
        run_inclusion(broken, active=None, floor=None)

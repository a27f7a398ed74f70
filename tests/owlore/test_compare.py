"""Runs held against each other from what they wrote down."""

import json

import pytest
from makers import save_tiny

import owlore
from htsr.errors import BadInput, NotFound
from owlore.compare import COLUMNS, compare_runs, data_differ, plot_held_out
from owlore.render import comparison_text

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    model = save_tiny(root / "model", blocks=3)
    common = {"steps": 4, "lr": 3e-3, "eval_data": 0.25}
    owlore.train(model, ROWS, method="full", out=root / "all", **common)
    owlore.train(model, ROWS, table="uniform", active=1, out=root / "few", **common)
    owlore.train(model, ROWS[:20], table="uniform", active=1, out=root / "other", **common)
    return root


def test_a_row_holds_what_run_json_says(runs):
    table = compare_runs([runs / "all", runs / "few"])
    assert [tuple(row) for row in table] == [COLUMNS, COLUMNS]
    record = json.loads((runs / "few/run.json").read_text())
    assert table[1]["loss_after"] == record["eval_loss_last"] and table[1]["peak_bytes"] == record["peak_bytes"]
    assert table[0]["trainable"] == pytest.approx(1.0) and table[1]["trainable"] < 0.5
    text = comparison_text(table)
    best = min(table, key=lambda row: row["loss_after"])["run"]
    assert text.splitlines()[1].startswith(best)


def test_different_data_are_noticed(runs):
    assert not data_differ([runs / "all", runs / "few"])
    assert data_differ([runs / "all", runs / "other"])


@pytest.mark.parametrize("against", ["step", "seconds"])
def test_every_run_is_a_line_and_its_held_out_dots(runs, against):
    from matplotlib.figure import Figure

    ax = plot_held_out([runs / "all", runs / "few"], Figure().add_subplot(), against=against)
    assert len(ax.lines) == 4
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["all (full)", "few (owlore)"]


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(NotFound):
        compare_runs([tmp_path / "gone"])
    with pytest.raises(BadInput, match=r"run\.json"):
        compare_runs([tmp_path])

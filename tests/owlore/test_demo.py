"""The demo: every promise it makes, on the packaged model with fewer steps."""

import json

import pytest

from htsr.errors import UsageError
from owlore import demo


@pytest.fixture
def short(monkeypatch):
    """The demo with a few steps and questions; the text for LOD is cut too."""
    import htsr

    settings = demo.load_yaml

    monkeypatch.setattr(demo, "load_yaml", lambda path: {**settings(path), "epochs": None, "steps": 6})
    monkeypatch.setattr(demo, "ASKED", 3)
    scan = htsr.scan
    monkeypatch.setattr(htsr, "scan", lambda *a, **k: scan(*a, samples=4, seq_len=128, **k))


def test_the_demo_leaves_a_scan_a_run_metrics_and_a_report(short, tmp_path, capsys):
    out = tmp_path / "owlore-demo"
    result = demo.run_demo(out, quiet=True)
    said = capsys.readouterr()
    assert said.err == "" and "held-out loss" in said.out and "layer table (rule lod)" in said.out
    assert result["heldout_loss"]["after"] < result["heldout_loss"]["before"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evals = [row["step"] for row in rows if row["split"] == "eval"]
    assert evals[0] == 0 and evals[-1] == 6
    assert (out / "scan/scan.csv").is_file() and (out / "run/model/config.json").is_file()
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "http://" not in page and "https://" not in page and "default-src 'none'" in page
    assert json.loads((out / "demo.json").read_text()) == result


def test_an_earlier_demo_is_replaced_also_one_that_was_cut_short(tmp_path):
    out = tmp_path / "owlore-demo"
    demo._clear(out)
    (out / "run").mkdir()
    demo._clear(out)
    assert [p.name for p in out.iterdir()] == [demo.MARKER]


def test_the_demo_overwrites_nothing_else(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not an earlier demo"):
        demo.run_demo(tmp_path, quiet=True)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_no_held_out_row_is_trained_on(tmp_path):
    train, heldout, rows = demo._divide(tmp_path)
    trained = set(train.read_text().splitlines())
    assert not trained & set(heldout.read_text().splitlines())
    assert len(rows) > 50

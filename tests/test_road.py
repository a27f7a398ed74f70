"""The whole road by its command lines, on a tiny model: scan, table, train, resume, generate; and every way to fail."""

import json
from pathlib import Path

import pytest
import torch
from makers import save_tiny, tiny_llama
from safetensors.torch import load_file

ROWS = [{"instruction": f"say {w * n}", "input": "", "output": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]


@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    """Runs `htsr ...` or `owlore ...` in this process, in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OWLORE_CACHE", str(tmp_path / "cache"))

    def run(program, *arguments):
        from importlib import import_module

        from htsr import console

        cli = import_module(f"{program}.cli").cli
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            console.run(cli, [str(a) for a in arguments])
        out, err = capfd.readouterr()
        return exit_.value.code, out, err

    return run


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def test_scan_table_train_resume_generate(command, data, tmp_path):
    model = save_tiny(tmp_path / "model", blocks=5, width=64, hidden=96)
    text = tmp_path / "text.txt"
    text.write_text("the rain in spain stays mainly in the plain. " * 60)
    code, out, _ = command("htsr", "scan", model, "--calibration", text, "--tau", 3, "--seq-len", 64, "--out", "scan")
    assert code == 0 and "alpha" in out
    names = {p.name for p in Path("scan").iterdir()}
    assert {"scan.csv", "blocks.csv", "table.json", "scan.json", "plots", "report.html"} <= names

    code, _, _ = command("htsr", "table", "scan", "--rule", "lod", "--gamma", 2, "-o", "table.json")
    assert code == 0
    table = json.loads(Path("table.json").read_text())
    assert sum(b["inclusion"] for b in table["blocks"]) == pytest.approx(2)

    train = ["train", model, "--data", data, "--table", "table.json", "--rank", 8, "--every", 3, "--batch", 4,
             "--lr", "5e-3", "--eval-data", 0.25, "--out", "run", "--schedule", "constant"]  # fmt: skip
    code, out, err = command("owlore", *train, "--steps", 5, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["eval_loss_last"] < record["eval_loss_first"]
    assert record["config"]["active"] is None and sum(record["draws"]) == 4  # two periods of the table's two blocks

    code, _, err = command("owlore", *train, "--steps", 8)
    assert code == 2 and "--resume" in err
    code, out, err = command("owlore", *train, "--steps", 8, "--resume", "--quiet")
    assert code == 0 and err == ""
    assert "held-out loss" in out
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["split"] == "train"] == list(range(1, 9))

    code, out, _ = command("owlore", "generate", "run/model", "--prompt", "the rain", "--max-new-tokens", 5)
    assert code == 0


def test_table_auto_scans_once_and_says_so(command, data, tmp_path):
    model = save_tiny(tmp_path / "model", blocks=4, width=64, hidden=96)
    train = ["train", model, "--data", data, "--steps", 1, "--active", 2]
    code, _, err = command("owlore", *train, "--out", "one")
    assert code == 0 and "scanning" in err
    code, _, err = command("owlore", *train, "--out", "two")
    assert code == 0 and "earlier scan" in err
    a, b = (load_file(f"{name}/model/model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_floor_that_the_table_had_is_kept_and_said_aloud(command, data, tmp_path):
    from htsr import LayerTable

    model = save_tiny(tmp_path / "model", blocks=4)
    LayerTable.build([4.0, 1.0, 1.0, 0.1], 2, floor=0.2).save(tmp_path / "table.json")
    train = ["train", model, "--data", data, "--steps", 1, "--table", "table.json"]
    _, _, err = command("owlore", *train, "--out", "one")
    assert "floor 0.2, which this run keeps; --floor 0 leaves it out" in err
    _, _, err = command("owlore", *train, "--out", "two", "--floor", 0.1)
    assert "--floor" not in err
    lowest = [min(json.loads((tmp_path / run / "run.json").read_text())["inclusion"]) for run in ("one", "two")]
    assert lowest == pytest.approx([0.2, 0.1])


def test_a_damaged_weight_is_a_failed_row_of_the_scan(command, tmp_path):
    broken = tiny_llama(blocks=3, width=64)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model = save_tiny(tmp_path / "model", broken)
    code, out, _ = command("htsr", "scan", model, "--calibration", "none", "--out", "scan")
    assert code == 0 and "1 failed" in out
    import pandas as pd

    frame = pd.read_csv("scan/scan.csv")
    failed = frame[frame["status"] == "failed"]
    assert failed["tensor"].tolist() == ["model.layers.1.mlp.up_proj.weight"]
    assert "NaN" in failed["reason"].item() and failed["alpha"].isna().all()
    assert (frame["status"] == "ok").sum() > 15


def failures(tmp_path):
    """name -> (program, arguments, exit code, a word of the message)."""
    model = save_tiny(tmp_path / "model", blocks=3)
    rows, empty, broken, table = (tmp_path / n for n in ("rows.json", "empty.json", "broken.jsonl", "table.json"))
    empty.write_text(json.dumps([{"instruction": "x", "input": "", "output": ""}]))
    broken.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", \n')
    from htsr import LayerTable

    LayerTable.uniform(7, 2).save(table)
    unknown_key = tmp_path / "config.yaml"
    unknown_key.write_text("learning_rate: 3\n")
    (tmp_path / "text.json").write_text("[]")
    train = ("train", model, "--steps", 1, "--data")
    return {
        "scan of a missing path": ("htsr", ("scan", tmp_path / "gone"), 5, "gone"),
        "scan of a lone text": ("htsr", ("scan", tmp_path / "rows.json"), 4, "rows.json"),
        "scan with an unknown option": ("htsr", ("scan", model, "--taus", 3), 2, "--tau"),
        "scan with a wrong value": ("htsr", ("scan", model, "--tau", "x"), 2, "tau"),
        "missing calibration": ("htsr", ("scan", model, "--calibration", tmp_path / "no.txt"), 5, "no.txt"),
        "table of a missing scan": ("htsr", ("table", tmp_path / "gone", "--rule", "lod"), 5, "gone"),
        "unknown rule": ("htsr", ("table", tmp_path, "--rule", "lodd"), 2, "lod"),
        "unknown command": ("htsr", ("scna", model), 2, "scan"),
        "missing model": ("owlore", ("train", tmp_path / "gone", "--data", rows), 5, "gone"),
        "missing data": ("owlore", (*train, tmp_path / "gone.json"), 5, "gone.json"),
        "no trained token": ("owlore", (*train, empty), 4, "no"),
        "malformed line": ("owlore", (*train, broken), 4, "2"),
        "table of another depth": ("owlore", (*train, rows, "--table", table), 4, "7 blocks"),
        "missing table": ("owlore", (*train, rows, "--table", tmp_path / "no.json"), 5, "no.json"),
        "unknown option": ("owlore", (*train, rows, "--learning-rate", 1), 2, "--"),
        "unknown key": ("owlore", (*train, rows, "--config", unknown_key), 2, "learning_rate"),
        "unknown method": ("owlore", (*train, rows, "--method", "owlora"), 2, "owlore"),
        "unread option": ("owlore", (*train, rows, "--method", "lisa", "--rank", 4), 2, "--rank"),
        "nothing to resume": ("owlore", (*train, rows, "--table", "uniform", "--out", "x", "--resume"), 5, "resume"),
        "impossible device": ("owlore", (*train, rows, "--device", "tpu"), 2, "tpu"),
    }


FAILURES = (
    "scan of a missing path", "scan of a lone text", "scan with an unknown option", "scan with a wrong value",
    "missing calibration", "table of a missing scan", "unknown rule", "unknown command", "missing model",
    "missing data", "no trained token", "malformed line", "table of another depth", "missing table", "unknown option",
    "unknown key", "unknown method", "unread option", "nothing to resume", "impossible device",
)  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_line_and_its_exit_code_and_leaves_nothing(command, data, tmp_path, name):
    program, arguments, expected, word = failures(tmp_path)[name]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command(program, *arguments, *(["--quiet"] if "train" in arguments or "scan" in arguments else []))
    assert code == expected, err
    assert out == "" and err.count("\n") == 1 and word in err
    assert "Traceback" not in err
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before] == []


def test_no_failure_is_missing_from_the_list(tmp_path):
    assert set(failures(tmp_path)) == set(FAILURES)

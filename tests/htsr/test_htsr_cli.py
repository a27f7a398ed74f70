"""The command line of htsr as a user meets it: results on stdout, one error line, the contract's exit codes."""

from __future__ import annotations

import inspect
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import makers
import pandas as pd
import pytest
import torch

from htsr import console
from htsr import weightwatcher_engine as ww
from htsr.cli import cli
from htsr.files import slug
from htsr.layer_table import LayerTable
from htsr.scanner import scan


class Result:
    """What a command line left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def htsr(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `htsr ...` in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            console.run(cli, [str(a) for a in arguments])
        return Result(int(stop.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return makers.save_tiny(tmp_path_factory.mktemp("models") / "tiny", blocks=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text("call me what you will; some years ago, never mind how long, i went to sea. " * 10)
    return path


@pytest.fixture(scope="module")
def scanned(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scan") / "tiny"
    scan(model, calibration=text, samples=4, seq_len=32, tau=3.0, out=out, quiet=True)
    return out


def test_scan_writes_the_files_and_prints_the_blocks(htsr: Any, model: Path, text: Path, tmp_path: Path) -> None:
    done = htsr("scan", model, "--calibration", text, "--samples", 2, "--seq-len", 32, "--tau", 3)
    assert (done.code, done.err) == (0, "")
    assert "23 matrices analysed, 0 failed" in done.out  # 7 in each of 3 blocks, embeddings and head
    assert "written to reports/scans/tiny/" in done.out
    directory = tmp_path / "reports/scans/tiny"
    assert len(pd.read_csv(directory / "blocks.csv")) == 3
    assert LayerTable.load(directory / "table.json").rule["name"] == "lod"
    assert (directory / "plots/alpha.png").read_bytes()[:4] == b"\x89PNG"


def test_json_is_one_object_and_quiet_is_quiet(htsr: Any, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    done = htsr("scan", model, "--calibration", text, "--out", out, "--no-plots", "--json", "--quiet", "--seq-len", 16)
    assert (done.code, done.err) == (0, "")
    record = json.loads(done.out)
    assert record["calibration"]["seq_len"] == 16
    assert [row["block"] for row in record["blocks"]] == [0, 1, 2]
    assert record["table"] == json.loads((out / "table.json").read_text())
    assert record["seconds"] == json.loads((out / "scan.json").read_text())["seconds"]
    assert not (out / "plots").exists()


def test_a_failed_matrix_is_a_row_and_a_notice_and_no_failure(htsr: Any, text: Path, tmp_path: Path) -> None:
    broken = makers.tiny_llama(blocks=2)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    makers.save_tiny(tmp_path / "broken", broken)
    done = htsr("scan", tmp_path / "broken", "--calibration", text, "--seq-len", 32, "--no-plots")
    assert done.code == 0
    assert "1 matrix failed" in done.err
    assert "up_proj" in done.err
    frame = pd.read_csv(tmp_path / "reports/scans/broken/scan.csv")
    failed = frame[frame["status"] == "failed"]
    assert failed["tensor"].tolist() == ["model.layers.1.mlp.up_proj.weight"]
    assert "NaN" in failed["reason"].iloc[0]
    assert failed["alpha"].isna().all()
    assert LayerTable.load(tmp_path / "reports/scans/broken").rule["name"] == "alpha"
    quiet = htsr("scan", tmp_path / "broken", "--calibration", "none", "--no-plots", "--quiet")
    assert (quiet.code, quiet.err) == (0, "")


def test_without_calibration_lod_is_empty_and_the_table_follows_alpha(htsr: Any, model: Path, tmp_path: Path) -> None:
    assert htsr("scan", model, "--calibration", "none", "--out", tmp_path / "o", "--no-plots").code == 0
    blocks = pd.read_csv(tmp_path / "o/blocks.csv")
    assert blocks["lod"].isna().all()
    assert blocks["lod_weight"].notna().all()
    table = LayerTable.load(tmp_path / "o/table.json")
    assert table.rule["name"] == "alpha"
    assert table.score.tolist() == pytest.approx((1 / blocks["alpha"]).tolist(), rel=1e-15)


def test_table_goes_to_stdout_or_to_a_file(htsr: Any, scanned: Path, tmp_path: Path) -> None:
    done = htsr("table", scanned, "--rule", "decrease", "--gamma", 2, "--temperature", 2)
    assert (done.code, done.err) == (0, "")
    printed = LayerTable.from_dict(json.loads(done.out))
    assert printed.score.tolist() == [3, 2, 1]
    assert printed.inclusion.sum() == pytest.approx(2)
    done = htsr("table", scanned, "--rule", "decrease", "--gamma", 2, "--temperature", 2, "-o", tmp_path / "d/t.json")
    assert "written to" in done.out
    assert LayerTable.load(tmp_path / "d/t.json").to_dict() == printed.to_dict()


@pytest.mark.parametrize("rule", ["lod", "alpha", "uniform", "decrease", "increase", "reverse", "norm"])
def test_every_rule_makes_a_valid_table(rule: str, htsr: Any, scanned: Path) -> None:
    done = htsr("table", scanned, "--rule", rule, "--gamma", 2)
    assert done.code == 0
    table = LayerTable.from_dict(json.loads(done.out))
    assert table.rule["name"] == rule
    assert table.model["num_blocks"] == 3


def test_a_gamma_beyond_the_positive_scores_is_said_aloud(htsr: Any, scanned: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(scanned / "scan.csv")
    frame.loc[frame["block"] > 0, "lod"] = frame.loc[frame["block"] > 0, "lod"] * 0
    (tmp_path / "zero").mkdir()
    frame.to_csv(tmp_path / "zero/scan.csv", index=False)
    (tmp_path / "zero/scan.json").write_text((scanned / "scan.json").read_text())
    done = htsr("table", tmp_path / "zero", "--rule", "lod", "--gamma", 2)
    assert "only 1 of 3 blocks have a positive score" in done.err
    assert json.loads(done.out)["blocks"][1]["inclusion"] == 0.5


def test_show_and_compare_read_what_scan_and_table_wrote(htsr: Any, scanned: Path) -> None:
    assert "23 matrices analysed" in htsr("show", scanned).out
    assert "rule lod" in htsr("show", scanned / "table.json").out
    assert json.loads(htsr("show", scanned, "--json").out)["model"]["num_blocks"] == 3
    assert json.loads(htsr("show", scanned / "table.json", "--json").out)["gamma"] == 3
    assert "alpha moved most" in htsr("compare", scanned, scanned).out
    assert len(json.loads(htsr("compare", scanned, scanned, "--json").out)["matrices"]) == 23


def test_verify_agrees_with_weightwatcher_row_by_row(htsr: Any, tmp_path: Path) -> None:
    makers.save_tiny(tmp_path / "m", blocks=2, width=64, heads=4, kv_heads=2, hidden=96)
    done = htsr("verify", tmp_path / "m", "--json")
    assert (done.code, done.err) == (0, "")
    rows = json.loads(done.out)["rows"]
    assert len(rows) == 2 * 7 + 2
    compared = [row for row in rows if row["note"] == ""]
    assert len(compared) > 8
    assert all(row["n_tail"] == row["ww_n_tail"] for row in compared)
    assert max(row["alpha_difference"] for row in compared) <= 1e-9
    for name in ("entropy", "stable_rank", "log10_norm", "alpha_hat", "ks_d", "xmin"):
        assert [row[name] for row in compared] == pytest.approx([row[f"ww_{name}"] for row in compared], rel=1e-6)
    assert "equal n_tail in" in htsr("verify", tmp_path / "m").out


def test_verify_fails_when_a_row_differs(htsr: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ww.full_weights

    def planted(source: Any, view: Any) -> Any:
        return read(source, view) * (1.001 if view.tensor == "model.layers.1.mlp.up_proj.weight" else 1)

    monkeypatch.setattr(ww, "full_weights", planted)
    done = htsr("verify", model, "--json")
    assert done.code == 1
    assert "1 of 23 matrices differ from weightwatcher" in done.err
    (row,) = [row for row in json.loads(done.out)["rows"] if not row["agrees"]]
    assert row["tensor"] == "model.layers.1.mlp.up_proj.weight"
    assert "log10_norm" in row["differ"]
    assert "stable_rank" not in row["differ"]  # a factor leaves the ratio alone


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("scan", "no/where/at/all"), 5, "no/where/at/all"),
        (("scan", "MODEL", "--calibration", "missing.txt"), 5, "missing.txt"),
        (("scan", "MODEL", "--calibration", "EMPTY"), 4, "no text"),
        (("scan", "."), 4, "without weights"),
        (("scan", "MODEL", "--engine", "wightwatcher"), 2, "did you mean weightwatcher"),
        (("scan", "MODEL", "--base", "no/where"), 5, "no/where"),
        (("scan", "MODEL", "--base", "demo"), 4, "no tensor of the same name and shape"),
        (("scan", "MODEL", "--tau", "0"), 2, "tau"),
        (("scan", "MODEL", "--tau", "nan"), 2, "tau"),
        (("scan", "MODEL", "--samples", "0"), 2, "samples"),
        (("scan", "MODEL", "--seq-len", "x"), 2, "--seq-len"),
        (("scan", "MODEL", "--sed", "1"), 2, "--seed"),
        (("scan", "MODEL", "--lod-scope", "blok"), 2, "did you mean block"),
        (("scan", "MODEL", "--precision", "fp61"), 2, "did you mean fp64"),
        (("scan", "MODEL", "--out", "EMPTY"), 2, "expected a directory"),
        (("scan", "MODEL", "--out", "INSIDE A FILE"), 2, "empty.txt is a file"),
        (("scan", "MODEL", "--device", "tpu"), 2, "device"),
        (("scan",), 2, "MODEL"),
        (("scann", "demo"), 2, "did you mean scan"),
        (("table", "nowhere"), 5, "nowhere"),
        (("table", "."), 4, "scan.csv"),
        (("table", "SCAN", "--rule", "lodd"), 2, "did you mean lod"),
        (("table", "SCAN", "--gamma", "0"), 2, "gamma"),
        (("table", "SCAN", "--floor", "2"), 2, "floor"),
        (("table", "SCAN", "--temperature", "-1"), 2, "temperature"),
        (("table", "SCAN", "--rule", "lod", "--direction", "light"), 2, "direction"),
        (("show", "nowhere"), 5, "nowhere"),
        (("show", "EMPTY"), 4, "JSON"),
        (("compare", "SCAN", "nowhere"), 5, "nowhere"),
    ],
)
def test_wrong_input_ends_with_its_code_and_one_line(
    arguments: tuple[str, ...], code: int, says: str, htsr: Any, model: Path, scanned: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    places = {"MODEL": str(model), "SCAN": str(scanned), "EMPTY": str(tmp_path / "empty.txt"),
              "INSIDE A FILE": str(tmp_path / "empty.txt" / "scan")}  # fmt: skip
    done = htsr(*[places.get(a, a) for a in arguments], *(["--quiet"] if len(arguments) > 1 else []))
    assert done.code == code, done.err
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("htsr: error: ")
    assert says in done.err
    assert done.out == ""
    assert not (tmp_path / "reports").exists()


def test_options_and_the_python_call_have_the_same_defaults() -> None:
    known = inspect.signature(scan).parameters
    options = cli.commands["scan"].make_context("scan", ["MODEL"]).params
    shared = {name: value for name, value in options.items() if name in known and name != "model"}
    assert len(shared) > 10
    assert shared == {name: known[name].default for name in shared}


def test_default_directories_are_named_after_the_model(tmp_path: Path) -> None:
    (tmp_path / "My Model").mkdir()
    assert slug("demo") == "demo"
    assert slug("org/name-1.5B") == "org-name-1.5B"
    assert slug(str(tmp_path / "My Model")) == "My-Model"
    assert slug("../..") not in ("", ".", "..")


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom htsr import console\nfrom htsr.cli import cli\n"
        "try:\n    console.run(cli, ['scan', '--help'])\n"
        "except SystemExit:\n    print([m for m in ('torch', 'numpy', 'pandas', 'transformers') if m in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        start = processor_seconds()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
        seconds.append(processor_seconds() - start)
    assert done.stdout.endswith("[]\n")
    assert "--lod-scope" in done.stdout
    assert min(seconds) < 0.3  # of the processor: other work hardly disturbs it


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA directory as PEFT writes it, for q of block 1 of the tiny model."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("adapters") / "lora"
    path.mkdir()
    g = makers.generator(0)
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {"A": torch.randn(9, 32, generator=g), "B": torch.randn(32, 9, generator=g)}
    save_file({f"{module}.lora_{side}.weight": w for side, w in factors.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 9, "lora_alpha": 18}))
    return path


def test_an_adapter_is_scanned_alone_and_on_its_base(htsr: Any, adapter: Path, model: Path, tmp_path: Path) -> None:
    alone = htsr("scan", adapter, "--no-plots", "--json")
    assert alone.code == 0
    assert alone.err.count("\n") == 1  # one notice: no text runs through differences
    frame = pd.read_csv(tmp_path / "reports/scans/lora/scan.csv")
    assert frame[["block", "role", "status"]].to_numpy().tolist() == [[1, "q", "ok"]]
    both = htsr("scan", adapter, "--base", model, "--calibration", "none", "--no-plots", "--quiet")
    assert (both.code, both.err) == (0, "")
    merged = pd.read_csv(tmp_path / "reports/scans/lora-against-tiny/scan.csv")
    assert merged.loc[merged["relative_change"] > 0, "tensor"].tolist() == ["model.layers.1.self_attn.q_proj.weight"]
    assert len(merged) == len(scan(model, calibration=None, quiet=True).frame)


def test_wrong_adapters_and_bases_have_the_contracts_exit_codes(
    htsr: Any, adapter: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    for arguments, code in (
        ((adapter, "--calibration", text), 4),
        ((model, "--base", adapter), 4),
        ((adapter, "--base", "demo"), 4),
        ((adapter, "--base", tmp_path / "none"), 5),
        ((model, "--base", tmp_path), 4),
    ):
        done = htsr("scan", *arguments, "--out", tmp_path / "out", "--quiet")
        assert (done.code, done.err.count("\n")) == (code, 1), done.err
        assert not (tmp_path / "out").exists()


def test_a_run_directory_says_where_its_model_lies(htsr: Any, model: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(model, tmp_path / "run/model")
    done = htsr("scan", tmp_path / "run")
    assert done.code == 4 and "run/model has some" in done.err

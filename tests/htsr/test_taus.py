"""Several outlier limits in one pass: the columns of each are those of a scan with it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import makers
import pandas as pd
import pytest

from htsr import console, load_scan
from htsr.cli import cli
from htsr.errors import UsageError
from htsr.result import ScanResult
from htsr.scan_data import BLOCK_COLUMNS
from htsr.scanner import scan
from htsr.taus import check_taus

TAUS = (3.0, 1.5, 5.0)
FURTHER = ["lod_tau1.5", "lod_weight_tau1.5", "lod_tau5", "lod_weight_tau5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return makers.save_tiny(tmp_path_factory.mktemp("models") / "tiny", blocks=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text("call me what you will; some years ago, never mind how long, i went to sea. " * 10)
    return path


def scanned(model: Path, text: Path | None, **settings: Any) -> ScanResult:
    return scan(model, calibration=text, samples=4, seq_len=32, quiet=True, **settings)


@pytest.mark.parametrize("scope", ["block", "matrix"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_each_tau_has_the_numbers_of_a_scan_with_it_alone(
    scope: str, calibrated: bool, model: Path, text: Path
) -> None:
    read = text if calibrated else None
    several = scanned(model, read, tau=TAUS, lod_scope=scope)
    assert several.frame.columns[-4:].tolist() == several.blocks.columns[-4:].tolist() == FURTHER
    assert several.blocks.columns[:-4].tolist() == list(BLOCK_COLUMNS)
    for tau, suffix in zip(TAUS, ("", "_tau1.5", "_tau5"), strict=True):
        one = scanned(model, read, tau=tau, lod_scope=scope)
        for column in ("lod", "lod_weight"):
            for mine, alone in ((several.frame, one.frame), (several.blocks, one.blocks)):
                pd.testing.assert_series_equal(mine[column + suffix], alone[column], check_names=False)
    assert several.blocks["lod_weight_tau1.5"].gt(several.blocks["lod_weight"]).all()
    assert several.blocks["lod_tau5"].isna().all() != calibrated


def test_the_table_is_the_first_taus_and_says_so(model: Path, text: Path) -> None:
    several, one = scanned(model, text, tau=TAUS), scanned(model, text, tau=3.0)
    assert several.table().score.tolist() == one.table().score.tolist() == several.blocks["lod"].tolist()
    assert several.table().rule["tau"] == 3.0
    assert several.provenance["settings"]["taus"] == several.provenance["calibration"]["taus"] == list(TAUS)
    assert (one.provenance["settings"]["tau"], one.provenance["settings"]["taus"]) == (3.0, [3.0])
    assert one.blocks.columns.tolist() == list(BLOCK_COLUMNS)


def test_a_saved_scan_keeps_them_to_the_last_bit(model: Path, text: Path, tmp_path: Path) -> None:
    result = scanned(model, text, tau=TAUS, out=tmp_path / "scan", plots=False)
    again = load_scan(tmp_path / "scan")
    pd.testing.assert_frame_equal(again.frame, result.frame, check_exact=True)
    lod = ["lod", "lod_weight", *FURTHER, "score", "probability", "inclusion"]
    pd.testing.assert_frame_equal(again.blocks[lod], result.blocks[lod], check_exact=True)
    assert again.table().to_dict()["blocks"] == result.table().to_dict()["blocks"]


def test_the_report_says_how_the_text_and_the_other_taus_agree(model: Path, text: Path, tmp_path: Path) -> None:
    scanned(model, text, tau=TAUS, out=tmp_path / "scan", plots=False)
    page = (tmp_path / "scan" / "report.html").read_text()
    assert "tau 3, 1.5, 5" in page
    assert "the first 2 windows of the text against the other 2" in page
    assert page.count("orders the blocks as the table&#39;s does with a correlation of") == 2
    assert "run in float32 (" in page


@pytest.mark.parametrize("tau", [(), [3, 3.0], "13", [13, "5"], [0], [5, float("nan")], True, None])
def test_what_are_no_taus_is_a_usage_error(tau: Any) -> None:
    with pytest.raises(UsageError, match="tau"):
        check_taus(tau)


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        console.run(cli, [str(a) for a in arguments])
    return int(stop.value.code or 0)


def test_the_command_takes_a_list(model: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    common = ("scan", model, "--calibration", text, "--seq-len", "32", "--no-plots", "--out", tmp_path / "o")
    assert run(*common, "--tau", "3,1.5") == 0
    assert (
        (tmp_path / "o" / "blocks.csv").read_text().splitlines()[0].endswith("inclusion,lod_tau1.5,lod_weight_tau1.5")
    )
    assert "lod_tau1.5" in capsys.readouterr().out
    for wrong in ("3,x", "3,", "3,3", "0", "3,-1"):
        assert run(*common, "--tau", wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1

"""weightwatcher as second engine, and the check of our numbers against its."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import makers
import numpy as np
import pandas as pd
import pytest
import torch

from htsr import scan as scan_function
from htsr import weightwatcher_engine as ww
from htsr.errors import UsageError
from htsr.verify import compare_rows, compared_columns, differs, verify

pytest.importorskip("weightwatcher")


def state() -> dict[str, torch.Tensor]:
    """One of everything that both engines meet: matrices, a kernel, experts, and what has no fit."""
    g = makers.generator(0)
    bad = torch.randn(16, 16, generator=g)
    bad[3, 4] = torch.nan
    return {
        "layers.0.q_proj.weight": torch.randn(40, 24, generator=g) * torch.randn(40, 1, generator=g).abs(),
        "layers.0.half.weight": torch.randn(24, 40, generator=g).bfloat16(),
        "layers.0.conv.weight": torch.randn(12, 8, 3, 3, generator=g),
        "layers.0.mlp.experts.down_proj": torch.randn(3, 24, 32, generator=g),
        "layers.0.zero.weight": torch.zeros(16, 16),
        "layers.0.nan.weight": bad,
        "layers.0.norm.weight": torch.ones(24),
        "layers.0.small.weight": torch.randn(9, 12, generator=g),
    }


def test_both_engines_fill_the_same_columns_with_the_same_numbers() -> None:
    native = scan_function(state(), calibration=None, quiet=True)
    theirs = scan_function(state(), calibration=None, quiet=True, engine="weightwatcher", workers=3)
    assert list(native.frame.columns) == list(theirs.frame.columns)
    fitted = native.frame["alpha"].notna()
    assert fitted.sum() == 7
    assert theirs.frame["alpha"].notna().tolist() == fitted.tolist()
    assert theirs.frame["status"].tolist() == native.frame["status"].tolist()
    for column in ("alpha", "ks_d", "xmin", "n_tail", "alpha_hill", "alpha_hat", "log10_norm", "lambda_max", "entropy"):
        ours, other = (f.loc[fitted, column].astype(float).tolist() for f in (native.frame, theirs.frame))
        assert other == pytest.approx(ours, rel=1e-8), column
    assert theirs.frame["lod_weight"].equals(native.frame["lod_weight"])
    assert theirs.provenance["settings"]["engine"] == "weightwatcher"
    assert theirs.provenance["versions"]["weightwatcher"]
    assert native.spectra is not None
    assert theirs.spectra is not None
    for name, values in native.spectra.items():
        assert theirs.spectra[name] == pytest.approx(values, rel=1e-7, abs=1e-9)


def test_verify_agrees_on_everything_that_both_can_analyse(capfd: pytest.CaptureFixture[str]) -> None:
    rows = verify(state(), quiet=True).set_index("tensor")
    assert rows["agrees"].all()
    assert (rows["differ"] == "").all()
    assert "NaN or infinite" in rows.loc["layers.0.nan.weight", "note"]
    assert rows["alpha_difference"].max() < 1e-9
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("column", "change"),
    [("alpha", 2e-5), ("n_tail", 1), ("log10_norm", 2e-5), ("entropy", 1e-3), ("ks_d", 2e-5), ("stable_rank", 1e-3)],
)
def test_a_planted_difference_in_any_column_is_named(column: str, change: float) -> None:
    row = {**dict.fromkeys(ww.SAME, 3.0), "tensor": "t", "status": "ok", "reason": ""}
    assert compare_rows(row, row)["agrees"]
    found = compare_rows(row, {**row, column: 3.0 + change})
    assert (found["agrees"], found["differ"]) == (False, column)


def test_a_fit_that_one_side_lacks_differs_and_a_missing_norm_does_not() -> None:
    row = {**dict.fromkeys(ww.SAME, 3.0), "tensor": "t", "status": "ok", "reason": ""}
    failed = {
        **row,
        **dict.fromkeys(ww.OF_THE_FIT, np.nan),
        "status": "failed",
        "reason": ww.FIT_FAILED,
    }
    assert set(compare_rows(row, failed)["differ"].split(", ")) == set(ww.OF_THE_FIT)
    assert compare_rows(failed, failed)["agrees"]
    assert not differs("entropy", np.nan, 0.3)
    left_out = {
        **dict.fromkeys(ww.SAME, np.nan),
        "tensor": "t",
        "status": "skipped",
        "reason": ww.LEFT_OUT,
    }
    assert compare_rows(row, left_out)["agrees"]
    assert compare_rows(row, left_out)["note"] == ww.LEFT_OUT


def test_what_weightwatcher_leaves_out_is_a_row_with_its_reason() -> None:
    wide = {"layers.0.a.weight": torch.ones(50_001, 8), "layers.0.b.weight": torch.eye(9)}
    frame = scan_function(wide, calibration=None, quiet=True, engine="weightwatcher").frame.set_index("tensor")
    assert frame.loc["layers.0.a.weight", "status"] == "skipped"
    assert frame.loc["layers.0.a.weight", "reason"] == ww.LEFT_OUT


def test_verify_of_nothing_keeps_its_columns() -> None:
    rows = verify({"layers.0.norm.weight": torch.ones(8)}, quiet=True)
    assert rows.empty
    assert list(rows.columns) == compared_columns()


def test_an_unknown_engine_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="did you mean weightwatcher"):
        scan_function({"w": torch.eye(9)}, engine="weightwatchr", quiet=True)


def test_the_native_engine_does_not_import_weightwatcher(tmp_path: Path) -> None:
    makers.save_tiny(tmp_path / "m", blocks=1)
    code = (
        "import sys, htsr; htsr.scan(sys.argv[1], calibration=None, quiet=True); "
        "assert 'weightwatcher' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], check=True)


def test_a_saved_scan_of_the_second_engine_reads_back(tmp_path: Path) -> None:
    from htsr import load_scan

    made = scan_function(state(), calibration=None, quiet=True, engine="weightwatcher", out=tmp_path / "s", plots=False)
    pd.testing.assert_frame_equal(load_scan(tmp_path / "s").frame, made.frame, check_exact=True)

"""Scan results: blocks from matrices, tables from blocks, files that read back the same, comparisons."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import makers
import numpy as np
import pandas as pd
import pytest
import torch
from makers import scan_rows as rows

import htsr
from htsr.errors import BadInput, NotFound, UsageError
from htsr.result import ScanResult
from htsr.scan_data import BLOCK_COLUMNS, aggregate_blocks


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScanResult]:
    text = tmp_path_factory.mktemp("text") / "t.txt"
    text.write_text("it is a truth universally acknowledged, that a single man must be in want of a wife. " * 20)
    model = makers.tiny_llama(blocks=3)
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[0, 0] = torch.inf
        model.model.layers[1].mlp.up_proj.weight[:, :2] *= 9
    yield htsr.scan(
        model, calibration=text, tokenizer=makers.byte_tokenizer(), samples=4, seq_len=64, tau=3, quiet=True
    )


def test_a_block_is_the_mean_of_its_matrices_and_its_lod_is_pooled() -> None:
    frame = rows(
        block=[0, 0, 0, 1, pd.NA],
        tensor=["a", "b", "n", "c", "e"],
        rows=[10, 30, 10, 10, 99],
        cols=[10, 10, 1, 10, 10],
        alpha=[2.0, 4.0, np.nan, 3.0, 9.0],
        alpha_hill=[1.5, 2.5, np.nan, 2.0, 9.0],
        stable_rank=[5.0, 7.0, np.nan, 1.0, 9.0],
        log10_norm=[2.0, 1.0, np.nan, 0.0, 9.0],
        lod=[1.0, 5.0, np.nan, np.nan, np.nan],
        lod_weight=[2.0, 0.0, np.nan, 4.0, np.nan],
        status=["ok", "ok", "skipped", "failed", "ok"],
    )
    blocks = aggregate_blocks(frame, {})
    assert blocks.columns.tolist() == list(BLOCK_COLUMNS[:9])
    first, second = blocks.to_dict("records")
    assert first == {
        "block": 0,
        "alpha": 3.0,
        "alpha_hill": 2.0,
        "lod": 100 * (1 + 15) / 400,
        "lod_weight": 0.5,
        "log10_norm": pytest.approx(np.log10(110)),
        "stable_rank": 6.0,
        "matrices": 2,
        "parameters": 410,
    }
    assert np.isnan(second["lod"])
    assert (second["matrices"], second["alpha"], second["lod_weight"]) == (0, 3.0, 4.0)


def test_every_block_of_the_model_has_a_row_even_when_nothing_is_known() -> None:
    blocks = aggregate_blocks(rows(block=[1], tensor=["a"], alpha=[2.0]), {}, num_blocks=3)
    assert blocks["block"].tolist() == [0, 1, 2]
    assert blocks["alpha"].isna().tolist() == [True, False, True]


def test_blocks_put_together_from_matrices_equal_the_measured_ones(scanned: ScanResult) -> None:
    again = aggregate_blocks(scanned.frame, {})
    measured = scanned.blocks[again.columns.tolist()]
    assert measured["lod"].iloc[:2].gt(0).all()
    pd.testing.assert_frame_equal(again, measured, check_exact=False, rtol=1e-12)


def test_the_default_rule_follows_what_is_known(scanned: ScanResult) -> None:
    assert scanned.frame.query("status == 'failed'")["tensor"].tolist() == ["model.layers.2.self_attn.q_proj.weight"]
    assert scanned.blocks["lod"].isna().tolist() == [False, False, True]  # an infinite weight leaves it unknown
    assert scanned.default_rule == "alpha"
    assert scanned.table().rule["name"] == "alpha"
    provenance = scanned.provenance
    full = rows(block=[0, 1], tensor=["a", "b"], lod=[1.0, 3.0], alpha=[2.0, 4.0])
    assert ScanResult(frame=full, provenance={}).table(gamma=1).probability.tolist() == [0.25, 0.75]
    nothing = rows(block=[0, 1], tensor=["a", "b"])
    assert ScanResult(frame=nothing, provenance={}).default_rule == "uniform"
    outside = rows(block=[pd.NA], tensor=["a"], alpha=[3.0])
    assert ScanResult(frame=outside, provenance={}).default_table is None
    assert len(ScanResult(frame=outside, provenance={}).blocks) == 0
    assert provenance["model"]["num_blocks"] == 3


def test_a_table_says_where_it_comes_from(scanned: ScanResult) -> None:
    table = scanned.table("alpha", gamma=2, temperature=2.0, floor=0.1, direction="light")
    alpha = scanned.blocks["alpha"].to_numpy()
    assert table.score.tolist() == alpha.tolist()
    assert table.probability == pytest.approx(np.sqrt(alpha) / np.sqrt(alpha).sum())
    assert table.rule == {"name": "alpha", "direction": "light", "temperature": 2.0, "floor": 0.1}
    assert table.model == scanned.provenance["model"]
    norms = scanned.table("norm").score
    matrices = scanned.frame[scanned.frame["block"] == 0]
    assert norms[0] == pytest.approx(np.sqrt((10 ** matrices["log10_norm"].dropna()).sum()), rel=1e-12)
    with pytest.raises(BadInput, match="block 2"):
        scanned.table("lod")
    with pytest.raises(UsageError, match="did you mean alpha"):
        scanned.table("alfa")


@pytest.fixture(scope="module")
def saved(scanned: ScanResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder with everything in it; the six plots take seconds."""
    return scanned.save(tmp_path_factory.mktemp("saved") / "deep" / "scan")


def test_a_saved_scan_reads_back_to_the_same_numbers(scanned: ScanResult, saved: Path) -> None:
    directory = saved
    names = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    plots = {f"plots/{name}.png" for name in ("alpha", "lod", "heatmap", "esd", "ks", "table")}
    assert names == plots | {"scan.csv", "blocks.csv", "table.json", "scan.json", "report.html", "spectra.npz"}
    assert sorted(p.name for p in directory.parent.iterdir()) == ["scan"]  # nothing temporary stays
    again = htsr.load_scan(directory)
    pd.testing.assert_frame_equal(again.frame, scanned.frame, check_exact=True)
    pd.testing.assert_frame_equal(again.blocks, scanned.blocks, check_exact=False, rtol=1e-12)
    assert htsr.LayerTable.load(directory).to_dict() == scanned.table().to_dict()
    assert again.spectra is not None
    assert scanned.spectra is not None
    assert all(np.array_equal(again.spectra[name], values) for name, values in scanned.spectra.items())
    record = json.loads((directory / "scan.json").read_text())
    assert record["seconds"]["plots"] > 0
    assert set(record["seconds"]) == {"load", "alpha", "lod", "plots"}


def test_csv_files_hold_full_precision_and_empty_cells(scanned: ScanResult, tmp_path: Path) -> None:
    directory = scanned.save(tmp_path / "scan", plots=False)
    header, *lines = (directory / "scan.csv").read_text().splitlines()
    start = "block,role,tensor,rows,cols,dtype,alpha,alpha_sigma,ks_d,xmin,n_tail,alpha_hill,alpha_hat,"
    assert header.startswith(start)
    assert "-1" not in [cell for line in lines for cell in line.split(",")]
    cells = dict(zip(header.split(","), lines[2].split(","), strict=True))
    assert cells["alpha"] == repr(float(scanned.frame["alpha"].iloc[2]))
    skipped = next(line for line in lines if ",skipped," in line)
    assert ",,,,,," in skipped
    assert (directory / "blocks.csv").read_text().splitlines()[0] == ",".join(BLOCK_COLUMNS)
    assert not (directory / "plots").exists()


def test_saving_again_replaces_its_own_files_and_leaves_others_alone(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "scan"
    shutil.copytree(saved, directory)
    (directory / "notes.txt").write_text("mine")
    (directory / "plots" / "mine.png").write_bytes(b"x")
    bare = ScanResult(frame=rows(block=[pd.NA], tensor=["a"], alpha=[2.5]), provenance={"schema": "htsr-scan/1"})
    bare.save(directory, plots=False)
    assert (directory / "notes.txt").read_text() == "mine"
    assert [p.name for p in (directory / "plots").iterdir()] == ["mine.png"]
    assert not (directory / "table.json").exists()  # an earlier scan's table must not pass for this one's
    assert not (directory / "spectra.npz").exists()
    assert len(htsr.load_scan(directory).frame) == 1


def test_text_that_a_spreadsheet_would_run_is_defused_and_numbers_are_not(tmp_path: Path) -> None:
    names = ["=cmd()", "+1", "-x", "@sum", "plain", "'quoted", "a,b\n"]
    frame = rows(block=[0] * 7, tensor=names, log10_norm=[-1.5] * 7)
    result = ScanResult(frame=frame, provenance={"schema": "htsr-scan/1", "model": {"id": "=x"}})
    directory = result.save(tmp_path / "scan", plots=False)
    raw = pd.read_csv(directory / "scan.csv", keep_default_na=False)
    assert raw["tensor"].tolist() == ["'=cmd()", "'+1", "'-x", "'@sum", "plain", "'quoted", "a,b\n"]
    assert raw["log10_norm"].tolist() == [-1.5] * 7
    assert htsr.load_scan(directory).frame["tensor"].tolist() == names


def test_what_is_no_scan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        htsr.load_scan(tmp_path / "missing")
    with pytest.raises(BadInput, match=r"scan\.csv"):
        htsr.load_scan(tmp_path)
    result = ScanResult(frame=rows(block=[0], tensor=["a"], alpha=[2.0]), provenance={"schema": "htsr-scan/1"})
    directory = result.save(tmp_path / "scan", plots=False)
    (directory / "scan.json").write_text('{"schema": "other/2"}')
    with pytest.raises(BadInput, match="other/2"):
        htsr.load_scan(directory)
    (directory / "scan.json").write_text('{"schema": "htsr-scan/1"}')
    (directory / "scan.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="not a scan's table"):
        htsr.load_scan(directory)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="expected a directory"):
        result.save(tmp_path / "file")


def test_comparing_a_scan_with_itself_finds_no_difference(scanned: ScanResult) -> None:
    same = htsr.compare(scanned, scanned)
    assert len(same) == (scanned.frame["status"] != "skipped").sum()
    assert same["alpha_diff"].dropna().eq(0).all()
    assert same["alpha_diff"].notna().sum() == scanned.frame["alpha"].notna().sum()


def test_comparison_pairs_by_block_and_role_and_keeps_what_only_one_has() -> None:
    a = rows(block=[0, 0, pd.NA], tensor=["x.q", "x.k", "emb"], role=["q", "k", "embeddings"], alpha=[2.0, 3.0, 4.0])
    b = rows(block=[0, 1, pd.NA], tensor=["y.q", "y.q1", "emb"], role=["q", "q", "embeddings"], alpha=[2.5, 5.0, 4.0])
    both = htsr.compare(ScanResult(frame=a, provenance={}), ScanResult(frame=b, provenance={}))
    found = [(str(r.block), r.tensor, r.alpha_diff) for r in both.itertuples()]
    assert found[0] == ("<NA>", "emb", 0.0)
    assert ("0", "x.q", 0.5) in found
    assert both["alpha_diff"].isna().sum() == 2
    with pytest.raises(BadInput, match="no matrix in common"):
        htsr.compare(ScanResult(frame=a.iloc[:1], provenance={}), ScanResult(frame=b.iloc[2:], provenance={}))


def test_importing_htsr_loads_neither_torch_nor_pandas() -> None:
    program = (
        "import sys, htsr; before = set(sys.modules); "
        "print([m for m in ('torch', 'pandas', 'numpy', 'matplotlib') if m in before]); "
        "from htsr.scanner import scan; print(htsr.scan is scan, sorted(htsr.__all__) == dir(htsr))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True True"]
    with pytest.raises(AttributeError, match="nothing"):
        htsr.nothing  # noqa: B018

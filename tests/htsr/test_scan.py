"""The scan end to end: every route gives the same rows, failures are rows, and nothing but the weights is loaded."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import makers
import numpy as np
import pandas as pd
import paper
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import htsr
from htsr import matrix_row as rows_module
from htsr import scan as scan_function
from htsr.errors import BadInput, NotFound, UsageError
from htsr.model.layers import views
from htsr.model.open import open_source

CONTRACT = [
    *("block", "role", "tensor", "rows", "cols", "dtype", "alpha", "alpha_sigma", "ks_d", "xmin", "n_tail"),
    *(
        "alpha_hill",
        "alpha_hat",
        "log10_norm",
        "log10_spectral_norm",
        "lambda_max",
        "stable_rank",
        "entropy",
        "lod",
        "lod_weight",
    ),
    *("status", "reason", "seconds", "part_of"),
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return makers.tiny_llama(blocks=3)


@pytest.fixture(scope="module")
def directory(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return makers.save_tiny(tmp_path_factory.mktemp("model") / "tiny", model)


def alone(model: Any, **options: Any) -> pd.DataFrame:
    """The frame of a scan without text, less its timings."""
    return scan_function(model, calibration=None, quiet=True, **options).frame.drop(columns="seconds")


def test_every_route_gives_the_same_rows_bit_for_bit(model: nn.Module, directory: Path, tmp_path: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    weight_map = {}
    for i in range(3):
        part = {key: tensors[key] for key in sorted(tensors)[i::3]}
        save_file(part, tmp_path / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    reference = alone(directory)
    for other in (model, model.state_dict(), tmp_path, directory / "model.safetensors", str(directory)):
        pd.testing.assert_frame_equal(alone(other), reference, check_exact=True)


def test_workers_and_order_change_nothing(directory: Path) -> None:
    pd.testing.assert_frame_equal(alone(directory, workers=1), alone(directory, workers=3), check_exact=True)


def test_every_tensor_has_one_row_with_the_contracts_columns(directory: Path) -> None:
    frame = scan_function(directory, calibration=None, quiet=True).frame
    assert list(frame.columns) == CONTRACT
    assert sorted(frame["tensor"]) == sorted(t.name for t in open_source(directory).tensors)
    assert set(frame["status"]) == {"ok", "skipped"}
    assert (frame.loc[frame["status"] == "skipped", "reason"] == "1-D: not a matrix").all()
    assert (frame.loc[frame["status"] == "ok", "reason"] == "").all()
    blocks = frame["block"].dropna().tolist()
    assert blocks == sorted(blocks)
    assert set(blocks) == {0, 1, 2}
    assert frame.loc[frame["block"].isna(), ["lod", "lod_weight"]].isna().all(axis=None)


def test_a_row_is_the_spectrum_of_its_matrix(directory: Path) -> None:
    result = scan_function(directory, calibration=None, quiet=True)
    source = open_source(directory)
    assert result.spectra is not None
    for row in result.frame.query("status == 'ok'").itertuples():
        sigma = np.linalg.svd(source.read(row.tensor).double().numpy(), compute_uv=False)
        values = np.sort(sigma**2)
        assert result.spectra[row.tensor] == pytest.approx(values, rel=1e-9, abs=1e-12 * values[-1])
        fit = htsr.fit_power_law(result.spectra[row.tensor][result.spectra[row.tensor] > 1e-5])
        assert (row.alpha, row.xmin, row.ks_d, row.n_tail) == (fit.alpha, fit.xmin, fit.ks_d, fit.n_tail)
        assert row.alpha_hat == pytest.approx(fit.alpha * np.log10(values[-1]))
        assert row.log10_norm == pytest.approx(np.log10(np.sum(source.read(row.tensor).double().numpy() ** 2)))


def test_stories_have_weightwatchers_numbers(stories: Path) -> None:
    ww = pytest.importorskip("weightwatcher")
    level = logging.root.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        theirs = ww.WeightWatcher(model=str(stories), log_level=logging.ERROR).analyze().set_index("longname")
    logging.root.setLevel(level)
    ours = alone(stories).query("status == 'ok'")
    names = ours["tensor"].str.removesuffix(".weight")
    assert set(theirs.index) == set(names)
    theirs = theirs.loc[names]
    assert (ours["n_tail"].to_numpy() == theirs["num_pl_spikes"].to_numpy()).all()
    for mine, reference in {"alpha": "alpha", "ks_d": "D", "entropy": "entropy", "stable_rank": "stable_rank"}.items():
        assert ours[mine].to_numpy() == pytest.approx(theirs[reference].to_numpy(), rel=1e-8), mine


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "2 of"), (np.inf, "2 of")])
def test_bad_numbers_make_a_failed_row_and_the_rest_goes_on(model: nn.Module, bad: float, word: str) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    victim = "model.layers.1.self_attn.q_proj.weight"
    state[victim][3, 5] = state[victim][7, 1] = bad
    frame, sound = alone(state).set_index("tensor"), alone(model).set_index("tensor")
    assert frame.loc[victim, "status"] == "failed"
    assert word in frame.loc[victim, "reason"]
    assert frame.loc[victim, ["alpha", "log10_norm", "lambda_max", "entropy"]].isna().all()
    others = [name for name in frame.index if name != victim and frame.loc[name, "block"] is not pd.NA]
    columns = ["alpha", "n_tail", "log10_norm", "status"]
    pd.testing.assert_frame_equal(frame.loc[others, columns], sound.loc[others, columns])


def test_matrices_without_a_power_law_fail_with_a_sentence_and_keep_their_norms() -> None:
    state = {
        "layers.0.identity.weight": 3 * torch.eye(32),
        "layers.1.zero.weight": torch.zeros(16, 16),
        "layers.2.tiny.weight": 1e-6 * torch.randn(16, 16, generator=makers.generator(0)),
        "layers.3.one.weight": torch.ones(12, 20),
    }
    frame = alone(state).set_index("role")
    assert (frame["status"] == "failed").all()
    assert "equal up to rounding" in frame.loc["identity", "reason"]
    assert "0 of 16 eigenvalues are above 1e-05" in frame.loc["tiny", "reason"]
    assert "fewer than two" in frame.loc["zero", "reason"]
    assert frame["alpha"].isna().all()
    assert frame.loc["identity", "lambda_max"] == pytest.approx(9)
    assert frame.loc["one", "stable_rank"] == pytest.approx(1)
    assert np.isnan(frame.loc["zero", "log10_norm"])
    assert not (frame.select_dtypes("number") == -1).any(axis=None)


def test_wide_vocabularies_stacks_and_odd_dtypes_each_get_a_row() -> None:
    rng = makers.generator(1)
    state = {
        "embed.weight": torch.randn(60_000, 8, generator=rng),
        "layers.0.half.weight": torch.randn(16, 24, generator=rng).half(),
        "layers.0.brain.weight": torch.randn(16, 24, generator=rng).bfloat16(),
        "layers.0.experts.down_proj": torch.randn(4, 8, 16, generator=rng),
        "layers.0.codes.weight": torch.ones(16, 16, dtype=torch.uint8),
        "layers.0.line.weight": torch.randn(1, 64, generator=rng),
        "layers.0.scalar": torch.tensor(3.0),
    }
    frame = alone(state).set_index("tensor")
    experts = {f"layers.0.experts.down_proj[{i}]" for i in range(4)}
    assert set(frame.index) == {*state, *experts} - {"layers.0.experts.down_proj"}
    analysed = {"embed.weight", "layers.0.half.weight", "layers.0.brain.weight"} | {
        name for name in experts if not frame.loc[name, "reason"]
    }
    assert len(analysed) > 3
    assert set(frame.index[frame["status"] == "ok"]) == analysed
    assert frame.loc["layers.0.brain.weight", "dtype"] == "bfloat16"
    assert (frame.loc[frame["status"] == "skipped", "reason"] != "").all()


def test_precision_fp32_is_near_and_auto_is_fp64(directory: Path) -> None:
    rough, exact, auto = (alone(directory, precision=p) for p in ("fp32", "fp64", "auto"))
    pd.testing.assert_frame_equal(exact, auto, check_exact=True)
    assert rough["lambda_max"].to_numpy() == pytest.approx(exact["lambda_max"].to_numpy(), rel=1e-5, nan_ok=True)
    assert (rough["lambda_max"].dropna() != exact["lambda_max"].dropna()).any()


@pytest.mark.parametrize("scope", ["block", "matrix"])
def test_lod_weight_without_text_is_the_definition(model: nn.Module, scope: str) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["model.layers.0.mlp.up_proj.weight"][:3] *= 30
    result = scan_function(state, calibration=None, tau=4, lod_scope=scope, quiet=True)
    assert result.frame["lod"].isna().all()
    for block in range(3):
        inside = result.frame.query("block == @block and status == 'ok'")
        matrices = [state[name] for name in inside["tensor"]]
        pooled, each = paper.weight_lod(matrices, 4)
        if scope == "matrix":
            each = [paper.weight_lod([W], 4)[0] for W in matrices]
        else:
            assert result.blocks.loc[block, "lod_weight"] == pytest.approx(pooled, rel=1e-9)
        assert inside["lod_weight"].tolist() == pytest.approx(each, rel=1e-9)
    assert result.blocks.loc[0, "lod_weight"] > result.blocks.loc[1, "lod_weight"]


def test_text_gives_every_matrix_of_a_block_its_lod(directory: Path) -> None:
    result = scan_function(directory, samples=2, seq_len=32, quiet=True)
    inside = result.frame["block"].notna() & (result.frame["status"] == "ok")
    assert result.frame.loc[inside, ["lod", "lod_weight"]].notna().all(axis=None)
    assert result.frame.loc[~inside, ["lod", "lod_weight"]].isna().all(axis=None)
    record = result.provenance["calibration"]
    assert (record["windows"], record["seq_len"], record["source"]) == (2, 32, "builtin")
    silent = alone(directory)
    assert result.frame.loc[inside, "lod_weight"].tolist() == pytest.approx(silent.loc[inside, "lod_weight"].tolist())


def test_what_cannot_run_loses_its_lod_and_says_why(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    result = scan_function(model.state_dict(), samples=1)
    assert result.frame["lod"].isna().all()
    assert result.provenance["calibration"] is None
    assert result.provenance["lod_reason"]
    assert capsys.readouterr().err.count("no LOD") == 1
    assert scan_function(model.state_dict(), quiet=True).provenance["lod_reason"]
    assert capsys.readouterr().err == ""


def test_an_explicit_text_for_what_cannot_run_is_bad_input(model: nn.Module, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words " * 100)
    with pytest.raises(BadInput):
        scan_function(model.state_dict(), calibration=text, quiet=True)


def test_a_missing_text_is_not_found(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        scan_function(directory, calibration=tmp_path / "nowhere.txt", quiet=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("precision", "fp16"), ("lod_scope", "model"), ("tau", 0), ("tau", float("nan")), ("tau", "13"),
        ("samples", 0), ("seq_len", 1), ("samples", 2.5), ("workers", 0),
    ],
)  # fmt: skip
def test_an_option_out_of_range_is_a_usage_error(directory: Path, option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=option.replace("_", ".")):
        scan_function(directory, calibration=None, quiet=True, **{option: value})


def test_an_unknown_device_is_a_usage_error(directory: Path) -> None:
    with pytest.raises(UsageError, match="device"):
        scan_function(directory, device="abacus", quiet=True)


def test_the_largest_matrices_come_first_and_the_bar_knows_their_cost(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    bars: list[Any] = []
    scanner = sys.modules["htsr.scanner"]
    exact, make = scanner.analyse, scanner.progress
    monkeypatch.setattr(
        scanner, "analyse", lambda s, v, p: seen.append(0 if v.reason else scanner.cost(v)) or exact(s, v, p)
    )
    monkeypatch.setattr(scanner, "progress", lambda *a, **k: bars.append(make(*a, **k)) or bars[-1])
    monkeypatch.setattr(scanner, "GIGA", 1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    scan_function(model, calibration=None, workers=1)
    assert seen == sorted(seen, reverse=True)
    assert bars[0].n == pytest.approx(bars[0].total) == pytest.approx(sum(seen))


def test_cost_is_that_of_the_smaller_side() -> None:
    tall, wide = views(
        open_source({"layers.0.a.weight": torch.zeros(40, 10), "layers.0.b.weight": torch.zeros(10, 40)})
    )
    assert rows_module.cost(tall) == rows_module.cost(wide) == pytest.approx(10 * 10 * 40 + 4 / 3 * 1000)


def test_provenance_names_model_settings_versions_and_costs(directory: Path) -> None:
    record = scan_function(directory, calibration=None, quiet=True, seed=3).provenance
    source = open_source(directory)
    assert record["model"] == {
        "id": "tiny", "revision": None, "num_blocks": 3, "config_sha256": source.config_sha256(),
        "weights_sha256": source.weights_sha256(),
    }  # fmt: skip
    assert record["settings"]["seed"] == 3
    assert record["settings"]["calibration"] is None
    assert set(record["seconds"]) == {"load", "alpha", "lod", "plots"}
    assert record["seconds"]["alpha"] > 0
    assert record["peak_bytes"] > 50e6
    assert record["versions"]["numpy"] == np.__version__


def test_the_peak_is_this_programs_and_not_its_parents() -> None:
    code = (
        "import subprocess, sys; held = bytearray(400 << 20)\n"
        "subprocess.run([sys.executable, '-c', 'from htsr.provenance import peak_bytes; print(peak_bytes())'])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    if Path("/proc/self/status").exists():
        assert 5e6 < int(done.stdout) < 200e6
    else:
        assert int(done.stdout) >= 0


def test_nothing_is_written_without_out(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scan_function(directory, calibration=None, quiet=True)
    assert list(tmp_path.iterdir()) == []
    scan_function(directory, calibration=None, quiet=True, plots=False, out="result")
    saved = htsr.load_scan("result")
    assert {"scan.csv", "blocks.csv", "table.json", "scan.json"} <= {p.name for p in (tmp_path / "result").iterdir()}
    assert len(saved.frame) == len(open_source(directory).tensors)


def test_a_scan_without_text_imports_neither_torch_nor_plots(directory: Path) -> None:
    code = (
        f"import sys, htsr; htsr.scan({str(directory)!r}, calibration=None, quiet=True).blocks\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_memory_of_the_alpha_pass_does_not_grow_with_the_model(tmp_path: Path) -> None:
    block = torch.randn(4096, 512, generator=makers.generator(0))
    state = {f"layers.{i}.{role}.weight": block * (i + 1) for i in range(16) for role in ("a",)}
    state["layers.3.a.weight"] = state["layers.3.a.weight"].T.contiguous()  # wide matrices are read in columns
    save_file(state, tmp_path / "model.safetensors")
    size, largest = 16 * block.nbytes, block.nbytes
    code = (
        "import json, scipy.linalg, htsr, htsr.scanner as scan, htsr.result\n"
        "from htsr.provenance import peak_bytes\n"
        "before = peak_bytes()\n"
        f"result = htsr.scan({str(tmp_path)!r}, calibration=None, quiet=True, workers=2)\n"
        "print(json.dumps([before, result.provenance['peak_bytes'], result.frame.status.eq('ok').sum().item()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, peak, analysed = json.loads(done.stdout)
    assert analysed == 16
    assert peak - before < 3 * largest + 40e6 < size
    assert peak < 3 * largest + 700 * 2**20


def test_blocks_whose_lod_a_broken_weight_took_away_are_named(tmp_path: Path) -> None:
    model = makers.tiny_llama(blocks=4)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    makers.save_tiny(tmp_path / "model", model)
    result = scan_function(str(tmp_path / "model"), plots=False, quiet=True)
    assert result.blocks["lod"].isna().tolist() == [False, False, True, True]
    assert "block 2 is not finite" in result.provenance["lod_reason"]


def test_a_checkpoint_that_lacks_a_blocks_tensor_has_no_lod(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = makers.save_tiny(tmp_path / "model", blocks=3) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    result = scan_function(str(tmp_path / "model"), plots=False, quiet=True)
    assert result.blocks["lod"].isna().all()
    assert "holds no layers.1.mlp.up_proj.weight" in result.provenance["lod_reason"]

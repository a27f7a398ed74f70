"""Overlap of leading singular vectors: planted angles, models with themselves, bounded memory, wrong models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import makers
import numpy as np
import pandas as pd
import pytest
import torch

from htsr import compare, load_scan
from htsr import scan as scan_function
from htsr.cli import cli
from htsr.errors import BadInput, UsageError
from htsr.model.open import open_source
from htsr.numerics.subspace import leading_vectors, overlap
from htsr.overlap import overlaps


def slices_of(W: np.ndarray, step: int = 7) -> Any:
    return lambda: (W[i : i + step] for i in range(0, len(W), step))


@pytest.mark.parametrize(("n", "m", "k"), [(40, 24, 5), (24, 24, 24), (30, 8, 12), (200, 9, 1)])
def test_leading_vectors_span_what_the_svd_does(n: int, m: int, k: int) -> None:
    W = np.random.default_rng(n).standard_normal((n, m))
    U, V = leading_vectors(slices_of(W), m, k)
    left, _, right = np.linalg.svd(W, full_matrices=False)
    k = min(k, m)
    assert (U.shape, V.shape) == ((n, k), (m, k))
    for found, expected in ((U, left[:, :k]), (V, right[:k].T)):
        assert found.T @ found == pytest.approx(np.eye(k), abs=1e-12)
        assert overlap(found, expected) == pytest.approx(1, abs=1e-10)


def test_a_matrix_of_low_rank_has_no_more_directions_than_that() -> None:
    rng = np.random.default_rng(0)
    W = rng.standard_normal((50, 3)) @ rng.standard_normal((3, 20))
    U, V = leading_vectors(slices_of(W), 20, 10)
    assert (U.shape[1], V.shape[1]) == (3, 3)
    assert leading_vectors(slices_of(np.zeros((9, 8))), 8, 4)[0].shape == (9, 0)
    assert np.isnan(overlap(np.zeros((9, 0)), np.zeros((9, 0))))


@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 4, np.pi / 2])
def test_the_overlap_of_planes_is_the_mean_squared_cosine_of_their_angles(angle: float) -> None:
    first = np.eye(6)[:, :2]
    second = np.eye(6)[:, :2].copy()
    second[:, 1] = np.cos(angle) * np.eye(6)[:, 1] + np.sin(angle) * np.eye(6)[:, 4]
    assert overlap(first, second) == pytest.approx((1 + np.cos(angle) ** 2) / 2)


def test_random_spaces_share_what_chance_says() -> None:
    rng = np.random.default_rng(3)
    bases = [np.linalg.qr(rng.standard_normal((60, 6)))[0] for _ in range(400)]
    shared = [overlap(a, b) for a, b in zip(bases[::2], bases[1::2], strict=True)]
    assert np.mean(shared) == pytest.approx(6 / 60, abs=4 * np.std(shared) / np.sqrt(len(shared)))


def planted(directions: np.ndarray, seed: int, shape: tuple[int, int], *, outputs: bool) -> torch.Tensor:
    """A matrix (out, in) whose leading outputs (or inputs) span `directions`, the other side random."""
    rng = np.random.default_rng(seed)
    k = directions.shape[1]
    other = np.linalg.qr(rng.standard_normal((shape[1] if outputs else shape[0], k)))[0]
    signal = directions @ other.T if outputs else other @ directions.T
    return torch.from_numpy(30 * signal + 0.1 * rng.standard_normal(shape)).float()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_outputs_and_inputs_are_told_apart(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((n, 4)))[0] for n in shape)
    a, b = (
        open_source({
            "layers.0.fc1.weight": planted(left, seed, shape, outputs=True),
            "layers.0.fc2.weight": planted(right, seed + 10, shape, outputs=False),
        })
        for seed in (1, 2)
    )  # fmt: skip
    found = overlaps(a, b, rank=4)
    assert found.loc[(0, "fc1"), "overlap_outputs"] > 0.999
    assert found.loc[(0, "fc1"), "overlap_inputs"] < 0.6
    assert found.loc[(0, "fc2"), "overlap_inputs"] > 0.999
    assert found.loc[(0, "fc2"), "overlap_outputs"] < 0.6
    assert found["overlap_rank"].tolist() == [4, 4]
    assert found.loc[(0, "fc1"), "chance_outputs"] == 4 / shape[0]


def test_conv1d_and_linear_mean_the_same_sides() -> None:
    g = makers.generator(0)
    weights = {part: torch.randn(*shape, generator=g) for part, shape in (("c_fc", (16, 40)), ("c_proj", (40, 16)))}
    conv = {f"h.0.mlp.{part}.weight": w for part, w in weights.items()}
    linear = {f"h.0.mlp.{part}.weight": w for part, w in (("fc1", weights["c_fc"].t()), ("fc2", weights["c_proj"].t()))}
    found = overlaps(open_source(conv), open_source({n: w.contiguous() for n, w in linear.items()}), rank=3)
    assert found[["overlap_outputs", "overlap_inputs"]].to_numpy() == pytest.approx(1, abs=1e-9)
    assert found.loc[(0, "fc1"), "chance_outputs"] == 3 / 40


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that differ in q of block 1, and their scans."""
    root = tmp_path_factory.mktemp("compare")
    model = makers.tiny_llama(blocks=2)
    makers.save_tiny(root / "a", model)
    weight = model.get_submodule("model.layers.1.self_attn.q_proj").weight
    weight.data = torch.randn(weight.shape, generator=makers.generator(5))
    makers.save_tiny(root / "b", model)
    for name in "ab":
        scan_function(root / name, calibration=None, quiet=True, out=root / f"scan-{name}", plots=False)
    return root


def test_a_model_compared_with_itself_has_zeros_and_overlap_one(scanned: Path) -> None:
    scan = load_scan(scanned / "scan-a")
    found = compare(scan, scan, models=(scanned / "a", scanned / "a"), rank=5)
    differences = found.filter(like="_diff")
    assert not differences.drop(columns="lod_diff").fillna(0).to_numpy().any()
    analysed = found["overlap_rank"].notna()
    assert analysed.sum() == 2 * 7 + 2
    assert found.loc[analysed, ["overlap_outputs", "overlap_inputs"]].to_numpy() == pytest.approx(1, abs=1e-9)


def test_only_what_differs_turns(scanned: Path) -> None:
    a, b = load_scan(scanned / "scan-a"), load_scan(scanned / "scan-b")
    found = compare(a, b, models=(scanned / "a", scanned / "b"), rank=5).set_index("tensor")
    victim = "model.layers.1.self_attn.q_proj.weight"
    assert found.loc[victim, "overlap_outputs"] < 0.5
    others = found.drop(index=victim)
    assert others["overlap_outputs"].dropna().to_numpy() == pytest.approx(1, abs=1e-9)
    assert not any(column.startswith("overlap") for column in compare(a, b).columns)


def test_other_weights_than_the_scanned_ones_are_bad_input(scanned: Path) -> None:
    a, b = load_scan(scanned / "scan-a"), load_scan(scanned / "scan-b")
    with pytest.raises(BadInput, match="other weights than the scan of a"):
        compare(a, b, models=(scanned / "b", scanned / "a"))
    with pytest.raises(UsageError, match="rank"):
        compare(a, b, models=(scanned / "a", scanned / "b"), rank=0)


def test_bad_numbers_and_other_shapes_leave_the_overlap_empty() -> None:
    g = makers.generator(0)
    one = {"layers.0.q.weight": torch.randn(16, 12, generator=g), "layers.0.k.weight": torch.randn(16, 12, generator=g)}
    two = {"layers.0.q.weight": torch.randn(20, 12, generator=g), "layers.0.k.weight": torch.full((16, 12), torch.nan)}
    found = overlaps(open_source(one), open_source(two), rank=3)
    assert np.isnan(found.loc[(0, "q"), "overlap_outputs"])
    assert 0 < found.loc[(0, "q"), "overlap_inputs"] < 1
    assert found.loc[(0, "k"), "overlap_rank"] == 0
    assert np.isnan(found.loc[(0, "k"), "overlap_inputs"])


def test_the_command_writes_a_table_and_pictures(scanned: Path, tmp_path: Path, capsys: Any) -> None:
    from htsr import console

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            console.run(cli, [str(a) for a in arguments])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    scans = (scanned / "scan-a", scanned / "scan-b")
    models = ("--models", scanned / "a", scanned / "b")
    code, out, err = run("compare", *scans, *models, "--out", tmp_path / "c", "--rank", 5)
    assert (code, err) == (0, "")
    assert "leading directions shared least" in out
    table = pd.read_csv(tmp_path / "c" / "compare.csv")
    assert len(table) == 16
    names = {p.name for p in (tmp_path / "c").glob("*.png")}
    assert names == {"alpha.png", "alpha_diff.png", "overlap_inputs.png", "overlap_outputs.png"}
    code, out, _ = run("compare", *scans, *models, "--json")
    assert code == 0
    assert all("overlap_outputs" in row for row in json.loads(out)["matrices"])
    assert run("compare", scans[1], scans[0], *models)[0] == 4
    assert run("compare", *scans, *models, "--rank", 0)[0] == 2
    assert run("compare", *scans, "--models", scanned / "a", "no/where/at/all")[0] == 5
    (tmp_path / "file").write_text("x")
    assert run("compare", *scans, "--out", tmp_path / "file")[0] == 2

"""--nulls from the weights to the report: columns, determinism, round trip, and the words about noise."""

from __future__ import annotations

from pathlib import Path

import makers
import numpy as np
import pandas as pd
import pytest
import torch

from htsr.matrix_row import COLUMNS
from htsr.null_columns import NULL_COLUMNS
from htsr.nulls import with_nulls
from htsr.report import describe, report_html
from htsr.result import ScanResult, load_scan
from htsr.scanner import scan
from htsr.verdict import null_sentences


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Pure noise, the same with three spikes, a heavy-tailed one and a thin product, in two blocks; and a vector."""
    g = makers.generator(seed)
    noise = 0.02 * torch.randn(256, 256, generator=g)
    spikes = sum(
        torch.outer(torch.randn(256, generator=g), torch.randn(256, generator=g)) * 0.02 * s for s in (0.12, 0.15, 0.2)
    )
    heavy = torch.from_numpy(np.random.default_rng(seed).standard_t(3, (64, 160))).float()
    thin = torch.randn(96, 4, generator=g) @ torch.randn(4, 80, generator=g)
    return {
        "model.layers.0.self_attn.q_proj.weight": noise,
        "model.layers.0.mlp.up_proj.weight": heavy,
        "model.layers.1.self_attn.q_proj.weight": noise + spikes,
        "model.layers.1.mlp.up_proj.weight": thin,
        "model.norm.weight": torch.ones(256),
    }


@pytest.fixture(scope="module")
def result() -> ScanResult:
    return scan(weights(), calibration=None, nulls=True, quiet=True)


def test_columns_come_after_the_contracts_and_only_on_request(result: ScanResult) -> None:
    plain = scan(weights(), calibration=None, quiet=True)
    assert list(plain.frame.columns) == list(COLUMNS)
    assert list(result.frame.columns) == [*COLUMNS, *NULL_COLUMNS]
    same = [name for name in COLUMNS if name != "seconds"]
    pd.testing.assert_frame_equal(result.frame[same], plain.frame[same])


def test_noise_spikes_and_heavy_tails_are_told_apart(result: ScanResult) -> None:
    rows = result.frame.set_index("tensor")
    noise, spiked = (rows.loc[f"model.layers.{block}.self_attn.q_proj.weight"] for block in (0, 1))
    heavy, thin = (rows.loc[f"model.layers.{block}.mlp.up_proj.weight"] for block in (0, 1))
    assert noise["p_null"] > 0.05
    assert noise["num_spikes"] == 0
    assert noise["mp_sigma"] == pytest.approx(0.02, rel=0.01)
    assert spiked["p_null"] < 1e-3
    assert spiked["num_spikes"] == 3
    assert (noise["p_null_by"], heavy["p_null_by"]) == ("tracy-widom", "permutation")
    assert heavy["p_null"] > 0.05
    assert heavy["kurtosis"] > 1
    assert thin["p_null"] < 1e-9
    assert thin["p_null_by"] == "bound"
    assert thin["num_spikes"] == 4
    assert thin["effective_rank"] < 4
    assert 200 < noise["effective_rank"] < 256


def test_interval_range_and_shares_belong_to_alpha(result: ScanResult) -> None:
    rows = result.frame[result.frame["alpha_low"].notna()]
    assert len(rows) == 3  # the thin product has 4 eigenvalues: no interval
    assert (rows["alpha_least"] <= rows["alpha"] * (1 + 1e-12)).all()
    assert (rows["alpha_most"] >= rows["alpha"] * (1 - 1e-12)).all()
    assert (rows["alpha_low"] < rows["alpha_high"]).all()
    shares = rows[["share_below_2", "share_2_to_4", "share_4_to_6", "share_above_6"]].sum(axis="columns")
    assert shares.tolist() == pytest.approx([1.0] * 3)


def test_a_vector_has_no_numbers(result: ScanResult) -> None:
    row = result.frame.set_index("tensor").loc["model.norm.weight", list(NULL_COLUMNS)]
    assert row["p_null_by"] == ""
    assert row.drop("p_null_by").isna().all()


def test_neither_workers_nor_other_tensors_change_a_digit(result: ScanResult) -> None:
    again = scan(weights(), calibration=None, nulls=True, quiet=True, workers=2)
    pd.testing.assert_frame_equal(again.frame[list(NULL_COLUMNS)], result.frame[list(NULL_COLUMNS)])
    alone = {k: v for k, v in weights().items() if "layers.0.mlp" in k}
    one = scan(alone, calibration=None, nulls=True, quiet=True).frame.iloc[0]
    known = result.frame.set_index("tensor").loc["model.layers.0.mlp.up_proj.weight"]
    assert one[["alpha_low", "p_gof", "p_null"]].tolist() == known[["alpha_low", "p_gof", "p_null"]].tolist()
    other = scan(alone, calibration=None, nulls=True, quiet=True, seed=1).frame.iloc[0]
    assert other["alpha_low"] != one["alpha_low"]


def test_a_transposed_matrix_has_the_same_noise_and_farms_of_its_outputs() -> None:
    W = weights()["model.layers.0.mlp.up_proj.weight"]  # (64, 160): as Conv1D stores a map from 64 to 160
    frames = [
        scan({"h.0.mlp.c_fc.weight": W, "h.0.mlp.c_proj.weight": W.T.contiguous(),
              "h.0.attn.c_attn.weight": torch.randn(64, 192, generator=makers.generator(0))},
             calibration=None, nulls=True, quiet=True).frame,
        scan({"model.layers.0.mlp.up_proj.weight": W.T.contiguous()}, calibration=None, nulls=True, quiet=True).frame,
    ]  # fmt: skip
    values = [frame[frame["role"].isin(["fc1", "up"])].iloc[0] for frame in frames]
    assert values[0]["kurtosis"] == pytest.approx(values[1]["kurtosis"], rel=1e-12)
    assert values[0]["alpha_farms"] == pytest.approx(values[1]["alpha_farms"], rel=1e-6)
    assert values[0]["mp_edge"] == pytest.approx(values[1]["mp_edge"], rel=1e-9)


def test_saved_columns_read_back_the_same(result: ScanResult, tmp_path: Path) -> None:
    result.save(tmp_path / "scan")
    assert (tmp_path / "scan" / "plots" / "ks.png").is_file()
    pd.testing.assert_frame_equal(load_scan(tmp_path / "scan").frame, result.frame)


def test_report_names_the_layers_that_are_like_noise(result: ScanResult) -> None:
    text = " ".join(describe(result))
    assert "2 of 4 matrices cannot be told from noise" in text
    named = text.split("p_null >= 0.05): ")[1].split(".weight.")[0]
    assert "model.layers.0.self_attn.q_proj" in named
    assert "model.layers.0.mlp.up_proj" in named
    assert "layers.1" not in named
    page = report_html(result, {})
    assert "cannot be told from noise" in page
    assert "chance that the same entries in random order" in page  # the columns are explained


def test_without_nulls_nothing_is_said_about_noise() -> None:
    plain = scan(weights(), calibration=None, quiet=True)
    assert null_sentences(plain.frame) == []
    assert "noise" not in " ".join(describe(plain))


def test_structure_everywhere_is_said_as_well(result: ScanResult) -> None:
    block = result.frame[result.frame["block"] == 1]
    assert null_sentences(block)[0].startswith("All 2 matrices differ from noise")


def test_pictures_show_the_noise_and_every_xmin(result: ScanResult) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    words = [text.get_text() for text in result.plot.esd(name).get_legend().get_texts()]
    assert any("3 of 256 values beyond" in word for word in words)
    plain = scan({name: weights()[name]}, calibration=None, quiet=True)
    assert not any("beyond" in t.get_text() for t in plain.plot.esd(name).get_legend().get_texts())
    axes = result.plot.ks(name)
    row = result.frame.set_index("tensor").loc[name]
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert f"alpha {row['alpha_least']:.2f} to {row['alpha_most']:.2f}" in " ".join(words)
    assert f"best: alpha {row['alpha']:.2f}" in words


def test_ks_picture_is_drawn_only_where_there_are_enough_eigenvalues() -> None:
    small = scan({"model.layers.0.mlp.up_proj.weight": torch.randn(10, 30, generator=makers.generator(0))},
                 calibration=None, quiet=True)  # fmt: skip
    assert small.plot.has("esd")
    assert not small.plot.has("ks")
    with pytest.raises(Exception, match="at least 20"):
        small.plot.ks("model.layers.0.mlp.up_proj.weight")


def test_every_tensor_without_a_row_stays_empty() -> None:
    frame = pd.DataFrame({"tensor": ["a", "b"]})
    extended = with_nulls(frame, {"a": {"p_null": 0.5, "p_null_by": "permutation", "num_spikes": 2}})
    assert extended["p_null"].tolist()[0] == 0.5
    assert extended["num_spikes"].isna().tolist() == [False, True]
    assert extended["p_null_by"].tolist() == ["permutation", ""]


def test_the_scale_of_the_weights_does_not_matter() -> None:
    """2^-100 squared is below what float32 holds; only the absolute cut of the fits knows the scale."""
    W = weights()["model.layers.0.mlp.up_proj.weight"].double()
    frames = [scan({"model.layers.0.mlp.up_proj.weight": W * scale}, base={"model.layers.0.mlp.up_proj.weight": W * 0},
                   calibration=None, nulls=True, quiet=True).frame for scale in (1.0, 2.0**-100)]  # fmt: skip
    same = ["alpha_low", "alpha_high", "p_gof", "effective_rank", "num_spikes", "kurtosis", "p_null", "alpha_farms"]
    assert frames[0]["p_null_by"].tolist() == ["permutation"]
    assert frames[1].loc[0, same].tolist() == pytest.approx(frames[0].loc[0, same].tolist(), rel=1e-6)


def test_a_matrix_flatter_than_noise_is_called_so() -> None:
    left, right = (torch.linalg.qr(torch.randn(128, 128, generator=makers.generator(s)))[0] for s in (3, 4))
    W = left @ torch.diag(torch.linspace(0.8, 1.2, 128)) @ right
    flat = scan({"model.layers.0.self_attn.v_proj.weight": W}, calibration=None, nulls=True, quiet=True).frame
    assert flat["p_null"].tolist() == [pytest.approx(1.0, abs=1e-6)]
    assert "1 is even flatter than noise" in null_sentences(flat)[0]


def test_differences_of_weights_are_judged_whatever_their_scale(tmp_path: Path) -> None:
    """Steps of 1e-4 have no eigenvalue above weightwatcher's cut; a thin step among them is structure."""
    g, base = makers.generator(5), weights()
    name = "model.layers.0.self_attn.q_proj.weight"
    thin = torch.outer(torch.randn(256, generator=g), torch.randn(256, generator=g))
    tuned = {k: v + 1e-4 * torch.randn(v.shape, generator=g) for k, v in base.items() if v.ndim == 2}
    tuned[name] = tuned[name] + 3e-5 * thin
    result = scan(tuned, base=base, calibration=None, nulls=True, quiet=True)
    rows = result.frame.set_index("tensor")
    assert rows.loc[name, "num_spikes"] == 1
    assert rows.loc[name, "p_null"] < 1e-3
    other = rows.loc["model.layers.1.self_attn.q_proj.weight"]
    assert other["p_null"] > 0.001
    assert other["mp_sigma"] == pytest.approx(1e-4, rel=0.02)
    result.save(tmp_path)
    assert "plots/ks.png" in {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png")}

"""A model against the one it was tuned from: differences by exact name, with a cut that knows no scale."""

from __future__ import annotations

from pathlib import Path

import makers
import numpy as np
import pytest
import torch
from torch import nn

from htsr import scan as scan_function
from htsr.errors import BadInput
from htsr.model.open import open_source


def tuned(base: nn.Module, size: float, seed: int = 3) -> nn.Module:
    """The base with its q and down projections moved by random entries of `size`."""
    model = makers.tiny_llama(blocks=2, width=64, hidden=96)
    model.load_state_dict(base.state_dict())
    g = makers.generator(seed)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "down_proj" in name:
            parameter.data += size * torch.randn(parameter.shape, generator=g)
    return model


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return makers.tiny_llama(blocks=2, width=64, hidden=96, seed=1)


def test_a_difference_is_that_of_the_weights_and_what_did_not_move_is_skipped(base: nn.Module, tmp_path: Path) -> None:
    model = tuned(base, 0.01)
    model.save_pretrained(tmp_path / "tuned")
    base.save_pretrained(tmp_path / "base")
    result = scan_function(tmp_path / "tuned", base=tmp_path / "base", quiet=True)
    frame = result.frame.set_index("tensor")
    assert result.spectra is not None
    moved = {name for name in frame.index if "q_proj" in name or "down_proj" in name}
    assert set(frame.index[frame["status"] == "ok"]) == moved == set(result.spectra)
    old, new = base.state_dict(), model.state_dict()
    for name in moved:
        difference = (new[name].double() - old[name].double()).numpy()
        assert result.spectra[name][-1] == pytest.approx(np.linalg.norm(difference, 2) ** 2, rel=1e-10)
        assert frame.loc[name, "dtype"] == "delta:float32"
        change = np.linalg.norm(difference) / float(old[name].double().norm())
        assert frame.loc[name, "relative_change"] == pytest.approx(change, rel=1e-10)
    still = frame[(frame["status"] == "skipped") & ~frame["reason"].str.startswith("1-D")]
    assert len(still) == 2 * 5 + 2
    assert (still["reason"] == "unchanged: every entry of the difference is zero").all()
    assert result.provenance["base"]["id"] == "base"
    assert "differences of weights" in result.provenance["lod_reason"]


def test_small_differences_are_fitted_where_an_absolute_cut_would_lose_them(base: nn.Module) -> None:
    """Entries of 1e-4 on matrices 64 wide: weightwatcher's cut at 1e-5 leaves almost nothing of them."""
    zero = {name: torch.zeros_like(w) for name, w in base.state_dict().items()}
    small = {n: w - base.state_dict()[n] for n, w in tuned(base, 1e-4).state_dict().items()}
    large = {n: w * 2.0**12 for n, w in small.items()}
    frames = [scan_function(state, base=zero, quiet=True).frame for state in (small, large)]
    fitted = [frame[frame["status"] == "ok"] for frame in frames]
    assert len(fitted[0]) == len(fitted[1]) == 4
    for column in ("alpha", "n_tail", "ks_d", "alpha_hill", "stable_rank"):
        assert fitted[0][column].tolist() == pytest.approx(fitted[1][column].tolist(), rel=1e-10), column
    parity = scan_function(small, calibration=None, quiet=True).frame
    names = fitted[0]["tensor"]
    assert (parity.set_index("tensor").loc[names, "n_tail"].fillna(0).to_numpy() < fitted[0]["n_tail"].to_numpy()).any()


def test_what_only_one_of_them_has_is_a_row_with_a_reason(base: nn.Module) -> None:
    state = dict(base.state_dict())
    other = {name: tensor for name, tensor in state.items() if "layers.1" not in name}
    other["lm_head.weight"] = torch.randn(70, 64, generator=makers.generator(0))
    frame = scan_function(state, base=other, quiet=True).frame.set_index("tensor")
    assert frame.loc["model.layers.1.mlp.up_proj.weight", "reason"] == "no tensor of this name in the base"
    assert "(70, 64) in the base" in frame.loc["lm_head.weight", "reason"]
    assert set(frame["status"]) == {"skipped"}


def test_differences_of_half_precision_weights_are_exact(base: nn.Module) -> None:
    before = {name: tensor.bfloat16() for name, tensor in base.state_dict().items()}
    after = {name: tensor.bfloat16() for name, tensor in tuned(base, 0.05).state_dict().items()}
    source = open_source(after, base=before)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert source.info(name).dtype == "delta:bfloat16"
    assert np.array_equal(source.window(name, (0, 64), (0, 64)), (after[name].double() - before[name].double()).numpy())


def test_a_hash_knows_both_sides(base: nn.Module) -> None:
    one, two = (open_source(tuned(base, 0.01, seed), base=base).weights_sha256() for seed in (1, 2))
    other = open_source(tuned(base, 0.01, 1), base=makers.tiny_llama(blocks=2, width=64, hidden=96, seed=9))
    assert len({one, two, other.weights_sha256()}) == 3
    assert one == open_source(tuned(base, 0.01, 1), base=base).weights_sha256()


def test_models_without_a_common_tensor_and_an_explicit_text_are_bad_input(base: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no tensor of the same name and shape"):
        open_source(base, base={"w": torch.zeros(9, 9)})
    (tmp_path / "t.txt").write_text("some text")
    with pytest.raises(BadInput, match="differences of weights"):
        scan_function(tuned(base, 0.1), base=base, calibration=tmp_path / "t.txt", quiet=True)

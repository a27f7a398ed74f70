"""LoRA adapters against PEFT itself: alone its difference, on its base its merged model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import makers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from htsr import scan as scan_function
from htsr.errors import BadInput
from htsr.model.layers import num_blocks, views
from htsr.model.open import open_source

peft = pytest.importorskip("peft")
EPS = float(np.finfo(np.float32).eps)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, initializer_range=0.1)
    )


def adapted(
    directory: Path, model: nn.Module, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Save base and adapter below `directory`; the weights before and after PEFT's own merge."""
    model.save_pretrained(directory / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, peft.LoraConfig(**{"lora_alpha": 12, "r": 10, **settings}))
        g = makers.generator(7)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data = torch.randn(parameter.shape, generator=g).abs() * 0.2
        tuned.save_pretrained(directory / "adapter")
        merged = tuned.merge_and_unload().state_dict()
    return before, merged


CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["v_proj", "up_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 12, "layers.1.mlp.up_proj": 9},
        "alpha_pattern": {"^model.layers.2.*q_proj": 5, "up_proj": 3},
    },
    "embeddings": {"target_modules": ["embed_tokens", "k_proj"]},
    "some-blocks": {"target_modules": ["q_proj"], "layers_to_transform": [2]},
}


@pytest.mark.parametrize("name", [*CASES, "fan-in-fan-out"])
def test_the_difference_is_that_of_pefts_merge(name: str, tmp_path: Path) -> None:
    conv1d = name == "fan-in-fan-out"
    settings = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} if conv1d else CASES[name]
    before, merged = adapted(tmp_path, gpt2() if conv1d else makers.tiny_llama(blocks=3), **settings)
    source = open_source(tmp_path / "adapter")
    changed = {t.name for t in source.tensors if not t.note}
    assert changed == {n for n in before if not torch.equal(before[n], merged[n])} - {"lm_head.weight"}
    for tensor in changed:
        difference = (merged[tensor] - before[tensor]).double()
        found = source.read(tensor).double()
        assert found.shape == difference.shape
        limit = 4 * EPS * float(merged[tensor].abs().max() + before[tensor].abs().max())
        assert float((found - difference).abs().max()) <= limit, tensor
    both = open_source(tmp_path / "adapter", base=tmp_path / "base")
    for info in both.tensors:
        weights = merged[info.name] if info.name in merged else merged[f"transformer.{info.name}"]
        assert torch.allclose(both.read(info.name), weights, rtol=0, atol=8 * EPS * float(weights.abs().max())), info
        assert info.dtype == (
            "merged:float32" if info.name in changed or f"transformer.{info.name}" in changed else "float32"
        )


def test_the_spectrum_of_rank_r_has_r_values_and_those_of_the_dense_difference(tmp_path: Path) -> None:
    before, merged = adapted(tmp_path, makers.tiny_llama(blocks=2), target_modules=["q_proj", "gate_proj"])
    result = scan_function(tmp_path / "adapter", quiet=True)
    assert result.spectra is not None
    assert result.frame["status"].tolist() == ["ok"] * 4
    for row in result.frame.itertuples():
        values = result.spectra[row.tensor]
        sigma = np.linalg.svd((merged[row.tensor] - before[row.tensor]).double().numpy(), compute_uv=False)
        assert len(values) == min(row.rows, row.cols)
        assert np.count_nonzero(values) == 10
        assert values[-10:] == pytest.approx(np.sort(sigma[:10] ** 2), rel=1e-4)
        assert row.n_tail <= 10
        assert row.dtype == "delta:float32"
    assert "differences of weights" in result.provenance["lod_reason"]
    assert result.frame["lod"].isna().all()
    assert result.frame["lod_weight"].notna().all()


def test_a_rank_too_small_for_a_fit_is_a_row_with_a_reason(tmp_path: Path) -> None:
    adapted(tmp_path, makers.tiny_llama(blocks=1), r=1, target_modules=["q_proj"])
    (row,) = scan_function(tmp_path / "adapter", quiet=True).frame.itertuples()
    assert (row.status, np.isnan(row.alpha)) == ("failed", True)
    assert "1 of 32 eigenvalues" in row.reason
    assert row.stable_rank == pytest.approx(1)


def test_an_untrained_adapter_changes_nothing_and_says_so(tmp_path: Path) -> None:
    adapted(tmp_path, makers.tiny_llama(blocks=1), target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: t * ("lora_B" not in n) for n, t in load_file(file).items()}, file)
    (row,) = scan_function(tmp_path / "adapter", quiet=True).frame.itertuples()
    assert row.status == "skipped"
    assert "every entry of the difference is zero" in row.reason


def test_tiny_updates_are_fitted_as_large_ones(tmp_path: Path) -> None:
    """The cut is relative: a difference a million times smaller has the same tail."""
    adapted(tmp_path, makers.tiny_llama(blocks=1), target_modules=["q_proj", "o_proj"])
    large = scan_function(tmp_path / "adapter", quiet=True).frame
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: t * 2.0**-10 for n, t in load_file(file).items()}, file)
    small = scan_function(tmp_path / "adapter", quiet=True).frame
    assert (small["log10_norm"] < large["log10_norm"] - 12).all()
    for column in ("alpha", "n_tail", "ks_d", "stable_rank"):
        assert small[column].tolist() == pytest.approx(large[column].tolist(), rel=1e-12)


def test_blocks_keep_their_numbers_where_only_some_are_adapted(tmp_path: Path) -> None:
    adapted(tmp_path, makers.tiny_llama(blocks=4), target_modules=["q_proj"], layers_to_transform=[1, 3])
    source = open_source(tmp_path / "adapter")
    assert [view.block for view in views(source)] == [1, 3]
    assert num_blocks(source) == 4
    result = scan_function(tmp_path / "adapter", quiet=True)
    assert result.blocks["matrices"].tolist() == [0, 1, 0, 1]
    assert result.default_rule == "uniform"


def test_dora_needs_its_base_and_is_merged_as_peft_does(tmp_path: Path) -> None:
    _, merged = adapted(tmp_path, makers.tiny_llama(blocks=2), target_modules=["q_proj", "down_proj"], use_dora=True)
    alone = scan_function(tmp_path / "adapter", quiet=True).frame
    assert set(alone["status"]) == {"skipped"}
    assert alone["reason"].str.contains("--base").all()
    both = open_source(tmp_path / "adapter", base=tmp_path / "base")
    for info in both.tensors:
        assert torch.allclose(both.read(info.name), merged[info.name], rtol=1e-5, atol=1e-6), info.name


def test_what_an_adapter_saves_whole_replaces_the_base(tmp_path: Path) -> None:
    model = makers.tiny_llama(blocks=1)
    _, merged = adapted(tmp_path, model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    alone = scan_function(tmp_path / "adapter", quiet=True).frame.set_index("tensor")
    assert alone.loc["lm_head.weight", "status"] == "skipped"
    assert "--base" in alone.loc["lm_head.weight", "reason"]
    both = open_source(tmp_path / "adapter", base=tmp_path / "base")
    assert torch.equal(both.read("lm_head.weight"), merged["lm_head.weight"])


def test_the_merged_model_is_scanned_like_any_other(tmp_path: Path) -> None:
    model = makers.tiny_llama(blocks=2)
    _, merged = adapted(tmp_path, model, target_modules=["q_proj", "up_proj"])
    makers.byte_tokenizer(64).save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    options: dict[str, Any] = {"calibration": tmp_path / "text.txt", "tau": 2, "seq_len": 32, "quiet": True}
    both = scan_function(tmp_path / "adapter", base=tmp_path / "base", **options)
    model.load_state_dict(merged)
    makers.save_tiny(tmp_path / "whole", model)
    whole = scan_function(tmp_path / "whole", **options)
    for column in ("alpha", "lod", "log10_norm", "stable_rank"):
        assert both.frame[column].tolist() == pytest.approx(whole.frame[column].tolist(), rel=1e-4, nan_ok=True), column
    change = both.frame.set_index("tensor")["relative_change"]
    moved = change[change > 0].index
    assert set(both.frame.loc[both.frame["relative_change"] > 0, "role"]) == {"q", "up"}
    base = load_file(tmp_path / "base" / "model.safetensors")
    for name in moved:
        expected = float((merged[name] - base[name]).norm() / base[name].norm())
        assert change[name] == pytest.approx(expected, rel=1e-5)
    assert both.provenance["base"] == {"id": "base", "revision": None}


def spoil(directory: Path, **settings: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"peft_type": "IA3"}, "expected LORA"),
        ({"r": 0}, "rank above 0"),
        ({"lora_alpha": "many"}, "expected numbers"),
        ({"rank_pattern": {"(": 4}}, "regular expression"),
        ({"use_qalora": True}, "use_qalora"),
    ],
)
def test_adapters_that_cannot_be_used_are_bad_input(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    adapted(tmp_path, makers.tiny_llama(blocks=1), target_modules=["q_proj"])
    spoil(tmp_path / "adapter", **settings)
    with pytest.raises(BadInput, match=says):
        open_source(tmp_path / "adapter")


def test_damaged_adapters_and_wrong_bases_are_bad_input(tmp_path: Path) -> None:
    adapted(tmp_path, makers.tiny_llama(blocks=1), target_modules=["q_proj"])
    wide = makers.save_tiny(tmp_path / "wide", blocks=1, width=48)
    with pytest.raises(BadInput, match="expected \\(48, 48\\), the base's"):
        open_source(tmp_path / "adapter", base=wide)
    gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(BadInput, match="expected a tensor of that name in the base other"):
        open_source(tmp_path / "adapter", base=tmp_path / "other")
    with pytest.raises(BadInput, match="got an adapter as base"):
        open_source(tmp_path / "base", base=tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    lone = next(name for name in weights if "lora_A" in name)
    save_file({lone: weights[lone]}, file)
    with pytest.raises(BadInput, match="expected A and B"):
        open_source(tmp_path / "adapter")
    file.unlink()
    with pytest.raises(BadInput, match="without weights"):
        open_source(tmp_path / "adapter")


def test_experts_adapted_as_one_parameter_are_rows_with_a_reason(tmp_path: Path) -> None:
    adapted(tmp_path, makers.tiny_llama(blocks=1), target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    g = makers.generator(0)
    prefix = "base_model.model.model.layers.0.mlp.experts"
    more = {
        f"{prefix}.lora_A.weight": torch.randn(8, 16, generator=g),
        f"{prefix}.lora_B.weight": torch.randn(16, 8, generator=g),
    }
    save_file({**load_file(file), **more}, file)
    spoil(tmp_path / "adapter", target_parameters=["mlp.experts.gate_up_proj"])
    frame = scan_function(tmp_path / "adapter", quiet=True).frame.set_index("tensor")
    assert "several experts" in frame.loc["model.layers.0.mlp.experts.weight", "reason"]
    assert frame.loc["model.layers.0.self_attn.q_proj.weight", "status"] == "ok"


def test_pickled_adapters_are_read_on_request_only(tmp_path: Path) -> None:
    adapted(tmp_path, makers.tiny_llama(blocks=1), target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    expected = open_source(tmp_path / "adapter").read("model.layers.0.self_attn.q_proj.weight")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(BadInput, match="allow-pickle"):
        open_source(tmp_path / "adapter")
    found = open_source(tmp_path / "adapter", allow_pickle=True)
    assert torch.equal(found.read("model.layers.0.self_attn.q_proj.weight"), expected)

"""Matrices inside tensors: experts, parts of fused projections, kernels; each equals the matrix held on its own."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import makers
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from htsr import scan as scan_function
from htsr.model.layers import LayerView, views
from htsr.model.open import open_source
from htsr.model.parts import Part, Runs, run
from htsr.model.reading import read_part, read_slice
from htsr.model.source import Source
from htsr.numerics.lowrank import product_eigenvalues
from htsr.numerics.spectrum import MatrixSlice, plan_slices

NUMBERS = ["alpha", "ks_d", "xmin", "n_tail", "alpha_hill", "log10_norm", "stable_rank", "entropy", "lod_weight"]
SIZES: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def frame_of(model: Any, **options: Any) -> pd.DataFrame:
    return scan_function(model, calibration=None, quiet=True, **options).frame


def matrix(source: Source, view: LayerView) -> np.ndarray:
    """A view read in blocks of both kinds, which must agree."""
    height = [read_slice(source, view, MatrixSlice(i, min(i + 5, view.rows))) for i in range(0, view.rows, 5)]
    width = [read_slice(source, view, MatrixSlice(i, min(i + 7, view.cols), axis=1)) for i in range(0, view.cols, 7)]
    assert np.array_equal(np.concatenate(height), np.concatenate(width, axis=1))
    return np.concatenate(height)


@pytest.mark.parametrize("seed", range(20))
def test_a_part_is_a_choice_of_rows_and_columns(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    stored = torch.from_numpy(rng.standard_normal((24, 30)).astype(np.float32))
    save_file({"w": stored}, tmp_path / "w.safetensors")

    def runs(length: int) -> Runs:
        width = int(rng.integers(1, 4))
        stride = int(rng.integers(width, 7))
        start = int(rng.integers(0, 3))
        count = int(rng.integers(1, (length - start - width) // stride + 2))
        return Runs(start=start, width=width, stride=stride, count=count)

    part = Part(tensor="w", rows=runs(24), cols=runs(30))
    expected = stored.numpy()[np.ix_(part.rows.indices(), part.cols.indices())]
    for source in (open_source({"w": stored}), open_source(tmp_path / "w.safetensors")):
        for axis, size in ((0, expected.shape[0]), (1, expected.shape[1])):
            for start in range(size):
                for stop in range(start + 1, size + 1):
                    wanted = expected[start:stop] if axis == 0 else expected[:, start:stop]
                    assert np.array_equal(read_part(source, part, MatrixSlice(start, stop, axis=axis)), wanted)


@pytest.mark.parametrize("budget", [8, 1 << 20])
def test_distant_columns_are_read_a_few_rows_at_a_time(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("htsr.model.reading.WINDOW_ELEMENTS", budget)
    stored = torch.arange(12.0 * 20).reshape(12, 20)
    part = Part(tensor="w", rows=run(2, 8), cols=Runs(start=1, width=1, stride=2, count=9))
    found = read_part(open_source({"w": stored}), part, MatrixSlice(0, 8))
    assert np.array_equal(found, stored[2:10, 1:19:2].numpy())


def fused_models() -> dict[str, tuple[Any, Any]]:
    """name -> model, and what its own forward pass makes of a fused weight: role -> rows as (out, in)."""
    import transformers as tf

    common = {**SIZES, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 56}

    def thirds(w: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip("qkv", w.chunk(3), strict=True))

    def by_head(w: torch.Tensor) -> dict[str, torch.Tensor]:
        heads = w.reshape(6, 3, 8, 48)
        return {role: heads[:, i].reshape(48, 48) for i, role in enumerate("qkv")}

    def grouped(w: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip("qkv", w.split([48, 16, 16]), strict=True))

    def falcon_groups(w: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = w.reshape(2, 3 + 2, 8, 48)
        return {
            "q": groups[:, :3].reshape(48, 48),
            "k": groups[:, 3].reshape(16, 48),
            "v": groups[:, 4].reshape(16, 48),
        }

    def shared(w: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip("qkv", w.split([48, 8, 8]), strict=True))

    falcon = {**SIZES, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "bias": False}
    gpt2 = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "n_embd": 48, "n_layer": 2, "n_head": 6}
    bigcode = {**gpt2, "n_inner": 56}
    return {
        "phi3": (tf.Phi3Config(**common, num_key_value_heads=2), grouped),
        "gpt2": (tf.GPT2Config(**gpt2), thirds),
        "gpt-neox": (tf.GPTNeoXConfig(**common), by_head),
        "bloom": (tf.BloomConfig(**SIZES, hidden_size=48, n_layer=2, n_head=6), by_head),
        "falcon-groups": (tf.FalconConfig(**falcon, new_decoder_architecture=True, num_kv_heads=2), falcon_groups),
        "falcon-shared": (tf.FalconConfig(**falcon, multi_query=True, new_decoder_architecture=False), shared),
        "falcon-heads": (tf.FalconConfig(**falcon, multi_query=False, new_decoder_architecture=False), by_head),
        "bigcode-shared": (tf.GPTBigCodeConfig(**bigcode, multi_query=True), shared),
        "bigcode-heads": (tf.GPTBigCodeConfig(**bigcode, multi_query=False), by_head),
        "mpt": (tf.MptConfig(vocab_size=40, d_model=48, n_layers=2, n_heads=6), thirds),
    }


@pytest.mark.parametrize(
    "name",
    ["phi3", "gpt2", "gpt-neox", "bloom", "falcon-groups", "falcon-shared", "falcon-heads", "bigcode-shared",
     "bigcode-heads", "mpt"],
)  # fmt: skip
def test_parts_of_a_fused_projection_are_the_separate_matrices(name: str) -> None:
    from transformers import AutoModelForCausalLM

    config, split = fused_models()[name]
    model = AutoModelForCausalLM.from_config(config)
    source = open_source(model)
    by_name = {view.tensor: view for view in views(source)}
    wholes = [view for view in by_name.values() if view.role == "qkv" and view.block is not None]
    assert len(wholes) == 2
    for whole in wholes:
        weight = source.read(whole.tensor)
        for role, expected in split(weight.t() if whole.transposed else weight).items():
            view = by_name[f"{whole.tensor}[{role}]"]
            assert (view.role, view.block, view.part_of) == (role, whole.block, whole.tensor)
            found = matrix(source, view)
            assert np.array_equal(found.T if whole.transposed else found, expected.numpy())


def test_parts_have_the_numbers_of_the_separate_matrices_and_blocks_count_the_whole_once() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(**SIZES, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
                        intermediate_size=56)  # fmt: skip
    model = Phi3ForCausalLM(config)
    result = scan_function(model, calibration=None, quiet=True)
    separate = {}
    for name, weight in model.state_dict().items():
        for fused, names, sizes in (("qkv_proj", "qkv", [48, 24, 24]), ("gate_up_proj", ("gate", "up"), [56, 56])):
            if fused in name:
                parts = weight.split(sizes)
                separate |= {name.replace(fused, f"{n}_proj"): p.clone() for n, p in zip(names, parts, strict=True)}
        if "qkv_proj" not in name and "gate_up_proj" not in name:
            separate[name] = weight
    own = frame_of(separate)
    key = ["block", "role"]
    parts = result.frame[result.frame["part_of"] != ""].set_index(key)
    assert len(parts) == 2 * 5
    expected = own[own["status"] != "skipped"].set_index(key).loc[parts.index]
    pd.testing.assert_frame_equal(parts[NUMBERS[:-1]], expected[NUMBERS[:-1]], check_exact=True)
    assert (
        result.blocks["parameters"].tolist()
        == scan_function(separate, calibration=None, quiet=True).blocks["parameters"].tolist()
    )
    assert result.blocks["matrices"].tolist() == [4, 4]
    whole = result.frame.query("block == 0 and status == 'ok' and part_of == ''")
    assert result.blocks.loc[0, "alpha"] == pytest.approx(whole["alpha"].mean())


def test_where_nothing_says_how_qkv_is_laid_out_it_is_reported_whole() -> None:
    state = {"layers.0.attn.query_key_value.weight": torch.randn(48, 16, generator=makers.generator(0))}
    assert [view.role for view in views(open_source(state))] == ["qkv"]
    attention = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24), 2, enable_nested_tensor=False)
    source = open_source(attention)
    roles = {view.role for view in views(source) if view.block == 1 and not view.reason}
    assert {"qkv", "q", "k", "v"} <= roles  # torch's own layer says it by its name


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SIZES, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2)  # fmt: skip
    return MixtralForCausalLM(config)


def test_stacked_experts_and_one_key_an_expert_give_the_same_rows(tmp_path: Path) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path)
    stacked, apart = frame_of(model), frame_of(tmp_path)
    assert "model.layers.0.mlp.experts.down_proj[4]" in set(stacked["tensor"])
    assert "model.layers.0.mlp.experts.gate_up_proj[4][up]" in set(stacked["tensor"])
    assert apart["tensor"].str.contains("experts.4.w3.weight").any()
    for frame in (stacked, apart):
        experts = frame[frame["role"].str.startswith("experts.")]
        assert len(experts) == 2 * 5 * 3
        assert (experts["part_of"] == "").all()
    columns = [*NUMBERS, "rows", "cols", "dtype", "status"]
    keyed = [f[f["status"] != "skipped"].set_index(["block", "role"])[columns].sort_index() for f in (stacked, apart)]
    pd.testing.assert_frame_equal(keyed[0], keyed[1], check_exact=True)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "unknown"])
def test_experts_stored_inputs_first(kind: str) -> None:
    g = makers.generator(0)
    gate, up, down = (torch.randn(3, *shape, generator=g) for shape in ((16, 20), (16, 20), (20, 16)))
    fused = torch.stack([gate, up], dim=-1).flatten(2) if kind == "gpt_oss" else torch.cat([gate, up], dim=-1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Config", (), {"to_dict": lambda self: {"model_type": kind}})()
            experts = nn.ParameterDict({"gate_up_proj": nn.Parameter(fused), "down_proj": nn.Parameter(down)})
            self.layers = nn.ModuleList([nn.ModuleDict({"experts": experts})])

    source = open_source(Model())
    found = {view.role: matrix(source, view) for view in views(source)}
    expected = {f"experts.{e}.down": down[e] for e in range(3)}
    if kind == "unknown":  # which half is the gate cannot be told
        expected |= {f"experts.{e}.gate_up": fused[e] for e in range(3)}
    else:
        expected |= {f"experts.{e}.gate": gate[e] for e in range(3)} | {f"experts.{e}.up": up[e] for e in range(3)}
    assert found.keys() == expected.keys()
    for role, weight in expected.items():
        assert np.array_equal(found[role], weight.numpy())


def test_granite_experts_and_stacks_of_other_names() -> None:
    g = makers.generator(0)
    state = {
        "layers.0.block_sparse_moe.input_linear.weight": torch.randn(2, 24, 16, generator=g),
        "layers.0.block_sparse_moe.output_linear.weight": torch.randn(2, 16, 12, generator=g),
        "layers.0.mixer.bank": torch.randn(2, 16, 12, generator=g),
        "layers.0.short_conv.weight": torch.randn(16, 16, 12, generator=g),
        "layers.0.experts.down_proj_bias": torch.randn(16, 12, generator=g),
    }
    found = {view.role: view for view in views(open_source(state))}
    experts = {f"experts.{e}.{role}" for e in range(2) for role in ("gate", "up", "down")}
    assert set(found) == experts | {"bank.0", "bank.1", "short_conv", "down_proj_bias"}
    assert "convolution" in found["short_conv"].reason
    assert "biases" in found["down_proj_bias"].reason


@pytest.mark.parametrize(("outputs", "inputs", "size"), [(16, 12, 3), (12, 16, 3), (20, 6, 2), (24, 3, 4), (16, 16, 1)])
def test_convolutions_have_weightwatchers_numbers(outputs: int, inputs: int, size: int, tmp_path: Path) -> None:
    ww = pytest.importorskip("weightwatcher")
    layer = nn.Conv2d(inputs, outputs, size, bias=False)
    layer.weight.data = torch.randn(outputs, inputs, size, size, generator=makers.generator(size))
    level = logging.root.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        watcher = ww.WeightWatcher(model=nn.Sequential(layer), log_level=logging.ERROR)
        theirs = watcher.analyze().iloc[0]
        spectrum = np.sort(watcher.get_ESD(layer=int(theirs["layer_id"]))) / 2  # get_ESD forgets the scale of analyze
    logging.root.setLevel(level)
    save_file({"features.0.weight": layer.weight.data}, tmp_path / "conv.safetensors")
    result = scan_function(tmp_path / "conv.safetensors", calibration=None, quiet=True)
    (row,) = result.frame.itertuples()
    assert result.spectra is not None
    assert result.spectra[row.tensor] == pytest.approx(spectrum, rel=1e-9, abs=1e-12)
    assert row.n_tail == theirs["num_pl_spikes"]
    names = {"alpha": "alpha", "ks_d": "D", "log10_norm": "log_norm", "stable_rank": "stable_rank", "xmin": "xmin"}
    for ours, reference in names.items():
        assert getattr(row, ours) == pytest.approx(theirs[reference], rel=1e-8), ours
    assert (row.rows, row.cols) == (outputs, inputs * size * size)


def test_a_convolution_beside_matrices_does_not_count_as_a_linear_map() -> None:
    g = makers.generator(0)
    state = {
        "layers.0.conv.weight": torch.randn(16, 16, 3, 3, generator=g),
        "layers.0.fc1.weight": torch.randn(16, 16, generator=g),
    }
    frame = frame_of(state).set_index("role")
    assert frame["status"].tolist() == ["ok", "ok"]
    assert np.isnan(frame.loc["conv", "lod_weight"])
    assert frame.loc["fc1", "lod_weight"] >= 0


@pytest.mark.parametrize(("n", "m", "r"), [(40, 24, 4), (24, 40, 4), (12, 12, 12), (9, 30, 16), (30, 30, 1)])
def test_a_product_of_thin_factors_has_the_spectrum_of_the_dense_matrix(n: int, m: int, r: int) -> None:
    rng = np.random.default_rng(n + r)
    B, A = rng.standard_normal((n, r)), rng.standard_normal((r, m))
    sigma = np.linalg.svd(B @ A, compute_uv=False)
    found = product_eigenvalues(B, A)
    assert len(found) == min(n, m)
    assert np.count_nonzero(found) == min(n, m, r)
    assert found == pytest.approx(np.sort(sigma**2), rel=1e-10, abs=1e-12 * sigma[0] ** 2)


def test_thin_factors_with_a_zero_factor_or_bad_numbers() -> None:
    assert not product_eigenvalues(np.zeros((9, 2)), np.ones((2, 8))).any()
    with pytest.raises(ValueError, match="NaN or infinite"):
        product_eigenvalues(np.full((9, 2), np.nan), np.ones((2, 8)))


def test_blocks_of_a_part_are_those_of_a_matrix_of_its_shape() -> None:
    """So that a part and the same matrix on its own have bit for bit the same spectrum."""
    stored = torch.randn(3 * 64, 32, generator=makers.generator(1))
    source = open_source({"w": stored})
    part = Part(tensor="w", rows=run(64, 64), cols=run(0, 32))
    blocks = [read_part(source, part, block) for block in plan_slices(64, 32)]
    assert np.array_equal(np.concatenate(blocks), stored[64:128].numpy())

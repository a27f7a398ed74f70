"""LOD of whole models: streaming against a plain forward pass with hooks, on several architectures and routes."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import makers
import numpy as np
import paper
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers.pytorch_utils import Conv1D

from htsr.errors import BadInput, NotFound, UsageError
from htsr.model.calibration import Calibration, calibrate
from htsr.model.open import open_source
from htsr.model.skeleton import Skeleton
from htsr.model.source import Source
from htsr.model.windows import cut_windows, read_texts

TAU, SEQ = 3.0, 24
SENTENCE = "the rain in spain stays mainly in the plain, and so it goes on. "


def tiny_gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return _seeded(transformers.GPT2LMHeadModel, config)


def tiny_gemma2() -> nn.Module:
    """Sliding and full attention take turns: each block is called with its own mask."""
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    return _seeded(transformers.Gemma2ForCausalLM, config)


def tiny_bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    return _seeded(transformers.BertForMaskedLM, config)


def tiny_t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return _seeded(transformers.T5ForConditionalGeneration, config)


def _seeded(kind: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
    with torch.no_grad():  # heavier tails than at initialisation, so that there are outliers to count
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1 + 3 * torch.rand(parameter.shape[1], generator=makers.generator(1)) ** 6)
    return model.eval()


MODELS = {
    "llama": (lambda: makers.tiny_llama(blocks=4), "model.layers"),
    "gpt2": (tiny_gpt2, "transformer.h"),
    "gemma2": (tiny_gemma2, "model.layers"),
    "bert": (tiny_bert, "bert.encoder.layer"),
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 40)
    return path


def run(source: Source, text: Path, **settings: Any) -> Calibration:
    tokenizer = makers.byte_tokenizer()
    return calibrate(source, text, **{"tau": TAU, "samples": 6, "seq_len": SEQ, "tokenizer": tokenizer} | settings)


def plain_inputs(model: nn.Module, stack: str, text: Path) -> list[list[tuple[Tensor, list[Tensor]]]]:
    """For each block each linear map's (out, in) weight and what it read, window by window, from a plain forward."""
    tokens = makers.byte_tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"]
    windows = cut_windows(tokens, samples=6, seq_len=SEQ, seed=0)
    found: list[list[tuple[Tensor, list[Tensor]]]] = []
    handles = []
    for block in model.get_submodule(stack):
        found.append([])
        for module in block.modules():
            if isinstance(module, nn.Linear | Conv1D):
                weight = module.weight.detach().t() if isinstance(module, Conv1D) else module.weight.detach()
                read: list[Tensor] = []
                found[-1].append((weight, read))
                hook = lambda _, args, read=read: read.append(args[0].detach().flatten(0, -2))  # noqa: E731
                handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_streamed_lod_is_owls_definition_on_a_plain_forward_pass(name: str, tmp_path: Path, text: Path) -> None:
    make, stack = MODELS[name]
    model = make()
    model.save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    inputs = plain_inputs(model, stack, text)
    for tau in (1.5, TAU, 5.0):
        found = run(source, text, tau=tau)
        assert found.route == "streamed"
        for index, maps in enumerate(inputs):
            weights, read = [w for w, _ in maps], [r for _, r in maps]
            assert found.blocks[index].lod == pytest.approx(paper.owl_lod(weights, read, tau), rel=1e-6)
            ones = [[torch.ones(1, w.shape[1])] for w in weights]
            assert found.blocks[index].lod_weight == pytest.approx(paper.owl_lod(weights, ones, tau), rel=1e-6)
        if tau < 5:
            assert max(b.lod for b in found.blocks.values()) > 0


@pytest.mark.parametrize("name", MODELS)
def test_matrix_scope_gives_each_matrix_its_own_mean(name: str, text: Path) -> None:
    make, stack = MODELS[name]
    model = make()
    inputs = plain_inputs(model, stack, text)
    found = run(open_source(model), text, scope="matrix")
    for index, maps in enumerate(inputs):
        expected = [paper.owl_lod([weight], [read], TAU) for weight, read in maps]
        fused = [weight for weight, _ in maps if len(weight) == 3 * weight.shape[1]] if name == "gpt2" else []
        roles = [key for key in found.matrices if key[0] == index and not (fused and key[1] in ("q", "k", "v"))]
        for weight, read in ((w, r) for w, r in maps if any(w is f for f in fused)):
            for role, third in zip("qkv", weight.chunk(3), strict=True):  # parts count against limits of their own too
                assert found.matrices[index, role].lod == pytest.approx(paper.owl_lod([third], [read], TAU), rel=1e-6)
        assert sorted(found.matrices[key].lod for key in roles) == pytest.approx(sorted(expected), rel=1e-6)
        sizes = [weight.numel() for weight, _ in maps]
        pooled = sum(e * n for e, n in zip(expected, sizes, strict=True)) / sum(sizes)
        assert found.blocks[index].lod == pytest.approx(pooled, rel=1e-6)


def test_under_block_scope_the_matrices_add_up_to_their_block(text: Path) -> None:
    model = makers.tiny_llama(blocks=2)
    found = run(open_source(model), text)
    sizes = {"q": 32 * 32, "k": 16 * 32, "v": 16 * 32, "o": 32 * 32, "gate": 48 * 32, "up": 48 * 32, "down": 48 * 32}
    for index, block in found.blocks.items():
        for what in ("lod", "lod_weight"):
            counts = sum(getattr(found.matrices[index, role], what) * n for role, n in sizes.items())
            assert counts / sum(sizes.values()) == pytest.approx(getattr(block, what), rel=1e-12)


def tiny_mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=9,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    return _seeded(transformers.MixtralForCausalLM, config)


def expert_inputs(model: nn.Module, text: Path) -> list[list[tuple[Tensor, list[Tensor]]]]:
    """For each block the weight of each expert's maps and what it read, from the experts' own definition."""
    tokens = makers.byte_tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"]
    found: list[list[tuple[Tensor, list[Tensor]]]] = []
    handles = []
    for layer in model.model.layers:
        experts, maps = layer.mlp.experts, []
        for gate_up, down in zip(experts.gate_up_proj.detach(), experts.down_proj.detach(), strict=True):
            maps += [(part, []) for part in (*gate_up.chunk(2), down)]
        maps.append((layer.mlp.gate.weight.detach(), []))  # the router is a linear map as well
        found.append(maps)

        def record(_: nn.Module, args: tuple[Tensor, ...], maps: Any = maps) -> None:
            hidden, chosen, _weights = args
            maps[-1][1].append(hidden.flatten(0, -2))
            for e in range(9):
                x = hidden.flatten(0, -2)[(chosen == e).any(-1)]
                (gate, read_gate), (up, read_up), (_, read_down) = maps[3 * e : 3 * e + 3]
                read_gate.append(x)
                read_up.append(x)
                read_down.append(nn.functional.silu(x @ gate.T) * (x @ up.T))

        handles.append(experts.register_forward_pre_hook(record))
    with torch.no_grad():
        for window in cut_windows(tokens, samples=6, seq_len=SEQ, seed=0):
            model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("route", ["directory", "module"])
def test_experts_are_pooled_with_their_own_tokens(route: str, tmp_path: Path, text: Path) -> None:
    model = tiny_mixtral()
    model.save_pretrained(tmp_path / "moe")  # with one tensor an expert, as published checkpoints have them
    found = run(open_source(tmp_path / "moe" if route == "directory" else model), text)
    assert found.route == "streamed"
    linear, experts = plain_inputs(model, "model.layers", text), expert_inputs(model, text)
    for index, (maps, more) in enumerate(zip(linear, experts, strict=True)):
        weights, read = [w for w, _ in (*maps, *more)], [r for _, r in (*maps, *more)]
        assert found.blocks[index].lod == pytest.approx(paper.owl_lod(weights, read, TAU), rel=1e-6)
        assert {f"experts.{e}.{part}" for e in range(9) for part in ("gate", "up", "down")} <= {
            role for block, role in found.matrices if block == index
        }


def test_directory_shards_module_and_lone_blocks_agree(tmp_path: Path, text: Path) -> None:
    model = makers.tiny_llama(blocks=3)
    makers.save_tiny(tmp_path / "one", model)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    routes = [run(open_source(m), text) for m in (tmp_path / "one", tmp_path / "many", model)]
    assert {r.route for r in routes} == {"streamed"}
    assert routes[0].blocks == routes[1].blocks == routes[2].blocks
    assert routes[0].matrices == routes[1].matrices == routes[2].matrices


def test_half_precision_checkpoints_are_run_in_fp32_on_their_stored_weights(tmp_path: Path, text: Path) -> None:
    half = makers.tiny_llama(blocks=2, dtype=torch.bfloat16)
    exact = makers.tiny_llama(blocks=2)
    exact.load_state_dict(half.state_dict())
    assert run(open_source(half), text).blocks == run(open_source(exact), text).blocks


class Uneven(nn.Module):
    """A model of nobody's library: blocks in a list, no configuration, dropout."""

    def __init__(self) -> None:
        super().__init__()
        g = makers.generator(0)
        self.embedding = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 40), nn.Dropout(), nn.Linear(40, 16)) for _ in range(3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=g) ** 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + 0.01 * layer(x)
        return x


@pytest.mark.parametrize("training", [True, False])
def test_a_foreign_module_is_measured_and_left_exactly_as_found(training: bool, text: Path) -> None:
    model = Uneven().train(training)
    model.layers[1].eval()
    model.layers[0][0].weight.grad = torch.ones(40, 16)
    model.layers[2].requires_grad_(False)
    before = {
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
    }
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.random.get_rng_state()
    found = run(open_source(model), text)
    after = {
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
    }
    assert after == before
    assert torch.equal(model.layers[0][0].weight.grad, torch.ones(40, 16))
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert "run as a whole" in found.route
    inputs = plain_inputs(model.eval(), "layers", text)
    for index, maps in enumerate(inputs):
        expected = paper.owl_lod([w for w, _ in maps], [r for _, r in maps], TAU)
        assert found.blocks[index].lod == pytest.approx(expected, rel=1e-6)


def test_encoder_decoder_blocks_are_numbered_encoder_first(tmp_path: Path, text: Path) -> None:
    model = tiny_t5()
    model.save_pretrained(tmp_path / "t5")
    found = run(open_source(tmp_path / "t5"), text)
    assert sorted(found.blocks) == [0, 1, 2, 3]
    assert "as a whole" in found.route
    assert len([1 for block, _ in found.matrices if block == 0]) < len([1 for block, _ in found.matrices if block == 2])


def write_gguf(path: Path, model: nn.Module) -> Path:
    """A llama GGUF file in fp32 with llama.cpp's names and its order of the rows of q and k."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    kinds = {
        **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        path_, weights = name.removesuffix(".weight"), tensor.numpy()
        if path_ in ends:
            writer.add_tensor(f"{ends[path_]}.weight", weights)
            continue
        _, _, block, kind = path_.split(".", 3)
        if kinds[kind] in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if kinds[kind] == "attn_q" else config.num_key_value_heads
            split = weights.reshape(heads, 2, config.head_dim // 2, -1)
            weights = np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weights.shape)
        writer.add_tensor(f"blk.{block}.{kinds[kind]}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_has_the_lod_of_the_model_it_was_made_from(tmp_path: Path, text: Path) -> None:
    model = makers.tiny_llama(blocks=2)
    found = run(open_source(write_gguf(tmp_path / "tiny.gguf", model)), text)
    assert "as a whole" in found.route  # its names are not the model's
    expected = run(open_source(model), text)
    assert found.matrices.keys() == expected.matrices.keys()
    for key, outliers in expected.matrices.items():
        assert found.matrices[key].lod == pytest.approx(outliers.lod, rel=1e-6)
    assert max(b.lod for b in expected.blocks.values()) > 0


def storages() -> dict[int, int]:
    """Place -> bytes of the memory of every tensor there is (a compiler of other tests keeps some that have none)."""
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and not isinstance(o, FakeTensor)]
    tensors = [tensor for tensor in tensors if not tensor.is_meta]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_only_one_block_has_weights_at_a_time(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = makers.tiny_llama(blocks=6, width=64, hidden=112, vocab=64)
    makers.save_tiny(tmp_path / "model", model)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    del model
    gc.collect()
    known = storages()
    held, fill = [], Skeleton.fill

    def count(self: Skeleton, names: Any) -> None:
        fill(self, names)
        gc.collect()
        held.append(sum(size for place, size in storages().items() if place not in known) // 4)

    monkeypatch.setattr(Skeleton, "fill", count)
    run(open_source(tmp_path / "model"), text)
    outside, *blocks = held  # once what lies outside the blocks, then block after block
    assert len(blocks) == 6
    hidden = 6 * SEQ * 64
    assert outside < 500  # the final norm and the windows: of the embeddings (4,096 numbers) rows are read, later
    assert all(block <= now <= 1.25 * block + 2 * hidden for now in blocks)


def test_windows_follow_the_contract() -> None:
    tokens = np.arange(105)
    every = cut_windows(tokens, samples=32, seq_len=10, seed=0)
    assert every.tolist() == [list(range(10 * i, 10 * i + 10)) for i in range(10)]
    few = cut_windows(tokens, samples=4, seq_len=10, seed=3)
    starts = [row[0] for row in few.tolist()]
    assert len(set(starts)) == 4
    assert starts == sorted(starts)
    assert all(start % 10 == 0 for start in starts)
    assert torch.equal(cut_windows(tokens, samples=4, seq_len=10, seed=3), few)
    assert not torch.equal(cut_windows(tokens, samples=4, seq_len=10, seed=4), few)


def test_windows_are_at_most_as_long_as_the_model_allows(text: Path) -> None:
    found = run(open_source(tiny_gpt2()), text, seq_len=512)
    assert (found.seq_len, found.windows) == (64, 6)


def test_texts_are_read_in_file_order(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": t, "other": 1}) + "\n" for t in ("one", "two")) + "\n")
    assert read_texts(rows).texts == ("one", "two")
    assert read_texts("builtin").source == "builtin"
    assert len(read_texts("builtin").texts[0]) > 50_000


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.jsonl", b"{}\n", "line 1"),
        ("a.jsonl", b'{"text": "x"}\nnope\n', "line 2"),
        ("a.csv", b"text\n", ".jsonl"),
        ("short.txt", b"the rain", "at least one window"),
    ],
)
def test_a_text_that_cannot_be_used_is_bad_input(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput, match=says):
        run(open_source(makers.tiny_llama(blocks=1)), path)


def test_what_cannot_be_calibrated_is_refused_with_a_reason(tmp_path: Path, text: Path) -> None:
    model = makers.tiny_llama(blocks=2)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(BadInput, match="no usable tokenizer"):
        run(open_source(tmp_path / "bare"), text, tokenizer=None)
    with pytest.raises(BadInput, match="configuration"):
        run(open_source(model.state_dict()), text)
    with pytest.raises(BadInput, match="another model's"):
        run(open_source(makers.tiny_llama(blocks=2, vocab=8)), text)
    with pytest.raises(NotFound, match="calibration text"):
        run(open_source(model), tmp_path / "missing.txt")
    with pytest.raises(UsageError, match="did you mean matrix"):
        run(open_source(model), text, scope="matrixes")
    for settings in ({"tau": 0.0}, {"tau": float("nan")}, {"samples": 0}, {"seq_len": 0}):
        with pytest.raises(UsageError, match="expected"):
            run(open_source(model), text, **settings)


def test_a_nan_leaves_lod_unknown_from_its_block_on(text: Path) -> None:
    model = makers.tiny_llama(blocks=3)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    found = run(open_source(model), text)
    assert [np.isnan(found.blocks[i].lod) for i in range(3)] == [False, True, True]
    assert [np.isnan(found.blocks[i].lod_weight) for i in range(3)] == [False, True, False]

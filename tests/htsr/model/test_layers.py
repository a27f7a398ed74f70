"""Blocks and roles from names: real architectures, file formats, and names never seen before."""

from __future__ import annotations

import random
from typing import Any

import makers
import pytest
import torch
from torch import nn

from htsr.errors import BadInput
from htsr.model.blocks import find_blocks, linear_maps
from htsr.model.layers import num_blocks, views
from htsr.model.names import locate_blocks, role_of, tied_copies
from htsr.model.open import open_source
from htsr.model.source import TensorInfo

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 50}


def build(name: str) -> nn.Module:
    """A tiny random model of an architecture, with 2 (or 2 + 3) blocks."""
    import transformers as tf

    layers = {**SMALL, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    grouped = {**layers, "num_key_value_heads": 2}
    other = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    configs: dict[str, Any] = {
        "Llama": lambda: tf.LlamaConfig(**grouped),
        "Mistral": lambda: tf.MistralConfig(**grouped),
        "Qwen2": lambda: tf.Qwen2Config(**grouped),
        "Gemma2": lambda: tf.Gemma2Config(**grouped, head_dim=8),
        "Phi": lambda: tf.PhiConfig(**layers),
        "Phi3": lambda: tf.Phi3Config(**grouped),
        "GPTNeoX": lambda: tf.GPTNeoXConfig(**layers),
        "GPT2": lambda: tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, **other),
        "OPT": lambda: tf.OPTConfig(**layers, ffn_dim=48, word_embed_proj_dim=32),
        "Bert": lambda: tf.BertConfig(**layers),
        "T5": lambda: tf.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4, vocab_size=50,
            feed_forward_proj="gated-gelu",
        ),
    }  # fmt: skip
    auto = {"Bert": tf.AutoModel, "T5": tf.AutoModelForSeq2SeqLM}.get(name, tf.AutoModelForCausalLM)
    return auto.from_config(configs[name]())


ROLES = {
    "Llama": {"q", "k", "v", "o", "gate", "up", "down"},
    "Mistral": {"q", "k", "v", "o", "gate", "up", "down"},
    "Qwen2": {"q", "k", "v", "o", "gate", "up", "down"},
    "Gemma2": {"q", "k", "v", "o", "gate", "up", "down"},
    "Phi": {"q", "k", "v", "o", "fc1", "fc2"},
    "Phi3": {"qkv", "o", "gate_up", "down"},
    "GPTNeoX": {"qkv", "o", "fc1", "fc2"},
    "GPT2": {"qkv", "o", "fc1", "fc2"},
    "OPT": {"q", "k", "v", "o", "fc1", "fc2"},
    "Bert": {"q", "k", "v", "o", "fc1", "fc2"},
    "T5": {"q", "k", "v", "o", "cross_q", "cross_k", "cross_v", "cross_o", "gate", "up", "down"},
}


@pytest.mark.parametrize("name", ROLES)
def test_names_and_modules_meet_at_the_same_block_and_role(name: str) -> None:
    model = build(name)
    source, stack = open_source(model), find_blocks(model)
    matrices = {(v.block, v.role): v for v in views(source) if v.block is not None and not v.reason and not v.part_of}
    maps = {(i, role): found for i, block in enumerate(stack.modules) for role, found in linear_maps(block).items()}
    depth = 5 if name == "T5" else 2
    assert num_blocks(source) == len(stack.modules) == len(stack.names) == depth
    assert {role for _, role in matrices} == ROLES[name]
    lookups = {key for key in matrices if key not in maps}
    assert all("relative_attention_bias" in matrices[key].tensor for key in lookups)
    for key, (module, transposed) in maps.items():
        assert torch.equal(source.read(matrices[key].tensor), module.weight)
        assert transposed == matrices[key].transposed == (name == "GPT2")
    for path, block in zip(stack.names, stack.modules, strict=True):
        assert model.get_submodule(path) is block


@pytest.mark.parametrize("name", ROLES)
def test_every_tensor_has_one_view_and_what_is_outside_has_no_block(name: str) -> None:
    model = build(name)
    source = open_source(model)
    found = [v for v in views(source) if not v.part_of]
    assert sorted(v.tensor for v in found) == sorted(t.name for t in source.tensors)
    stack = find_blocks(model)
    for view in found:
        assert (view.block is not None) == any(view.tensor.startswith(f"{path}.") for path in stack.names)
        assert bool(view.reason) == (len(source.info(view.tensor).shape) != 2 or min(view.rows, view.cols) < 8)
    outside = {v.role for v in found if v.block is None and not v.reason}
    assert "embeddings" in outside
    assert outside <= {"embeddings", "position_embeddings", "head", "pooler"}


def test_blocks_are_numbered_by_their_integers_not_by_the_alphabet() -> None:
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(12)]
    random.Random(0).shuffle(names)
    assert all(block == int(name.split(".")[2]) for name, (block, _) in locate_blocks(names).items())
    source = open_source({name: torch.zeros(8, 8) for name in names})
    assert [v.block for v in views(source)] == list(range(12))


def test_unknown_names_fall_back_to_the_longest_family_of_integers() -> None:
    state = {f"trunk.cell.{i}.mixer.{part}.weight": torch.zeros(8, 8) for i in range(4) for part in ("alpha", "beta")}
    state |= {f"stem.{i}.weight": torch.zeros(8, 8) for i in range(2)}
    state |= {"readout.weight": torch.zeros(9, 8)}
    source = open_source(state)
    assert num_blocks(source) == 4
    by_name = {v.tensor: v for v in views(source)}
    assert (by_name["trunk.cell.3.mixer.beta.weight"].block, by_name["trunk.cell.3.mixer.beta.weight"].role) == (
        3,
        "beta",
    )
    assert by_name["stem.1.weight"].block is None
    assert by_name["readout.weight"].block is None


def test_a_model_without_integers_has_no_blocks() -> None:
    source = open_source({"weight": torch.zeros(8, 8)})
    assert num_blocks(source) == 0
    assert [v.block for v in views(source)] == [None]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("blk.3.attn_q.weight", "q"),
        ("blk.3.attn_output.weight", "o"),
        ("blk.3.ffn_gate.weight", "gate"),
        ("blk.3.ffn_norm.weight", "norm"),
        ("blk.3.attn_k.bias", "k.bias"),
        ("token_embd.weight", "embeddings"),
        ("output.weight", "head"),
        ("output_norm.weight", "norm"),
        ("block_sparse_moe.experts.11.w2.weight", "experts.11.down"),
        ("mlp.experts.3.gate_proj.weight", "experts.3.gate"),
        ("mlp.shared_expert.up_proj.weight", "shared.up"),
        ("mlp.gate.weight", "router"),
        ("attn.Wqkv.weight", "qkv"),
        ("self_attn.q_proj.base_layer.weight", "q"),
        ("encoder_attn.k_proj.weight", "cross_k"),
        ("transformer.ln_f.weight", "norm"),
        ("mystery.thing.weight", "thing"),
    ],
)
def test_roles_have_one_name_across_architectures(name: str, role: str) -> None:
    rest = name.split(".", 2)[2] if name.startswith("blk.") else name
    assert role_of(rest) == role


def test_gguf_names_meet_the_names_of_transformers() -> None:
    def roles(shapes: dict[str, tuple[int, int]]) -> dict[str, str]:
        found = views(open_source({name: torch.zeros(shape) for name, shape in shapes.items()}))
        return {v.tensor.split(".")[2]: v.role for v in found if not v.part_of}

    plain = {"blk.0.ffn_up.weight": (48, 16), "blk.0.ffn_down.weight": (16, 48)}
    assert roles(plain) == {"ffn_up": "fc1", "ffn_down": "fc2"}
    assert roles({**plain, "blk.0.ffn_gate.weight": (48, 16)}) == {
        "ffn_up": "up",
        "ffn_down": "down",
        "ffn_gate": "gate",
    }
    fused = {"blk.0.ffn_up.weight": (96, 16), "blk.0.ffn_down.weight": (16, 48)}
    assert roles(fused) == {"ffn_up": "gate_up", "ffn_down": "down"}


def test_two_matrices_of_one_role_keep_apart() -> None:
    state = {f"h.{i}.{side}.proj.weight": torch.zeros(8, 8) for i in range(2) for side in ("left", "right")}
    found = views(open_source(state))
    assert [(v.block, v.role) for v in found] == [(i, f"{side}.proj") for i in range(2) for side in ("left", "right")]
    block = nn.ModuleDict({side: nn.ModuleDict({"proj": nn.Linear(8, 8)}) for side in ("left", "right")})
    assert set(linear_maps(block)) == {"left.proj", "right.proj"}


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(8), "1-D"),
        (torch.tensor(1.0), "0-D"),
        (torch.zeros(4, 8, 7), "only 7 singular values in each matrix of the stack"),
        (torch.zeros(8, 8, 3, 3, 3), "convolution"),
        (torch.zeros(2, 3, 1, 1), "only 2 singular values"),
        (torch.zeros(8, 8, dtype=torch.int8), "int8"),
        (torch.zeros(1, 64), "only 1 singular value"),
        (torch.zeros(7, 64), "only 7 singular values"),
    ],
)
def test_what_cannot_be_analysed_says_why(tensor: torch.Tensor, reason: str) -> None:
    (view,) = views(open_source({"layers.0.x.weight": tensor}))
    assert reason in view.reason
    assert view.rows * view.cols == tensor.numel()


def test_encoder_and_decoder_are_numbered_encoder_first() -> None:
    names = [f"decoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(3)]
    names += [f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(2)]
    places = locate_blocks(names)
    assert [places[name][0] for name in names] == [2, 3, 4, 0, 1]


def test_only_a_head_that_equals_the_embeddings_in_shape_is_a_tied_copy() -> None:
    def info(name: str, rows: int) -> TensorInfo:
        return TensorInfo(name=name, shape=(rows, 8), dtype="float32")

    tensors = [
        info("model.embed_tokens.weight", 50),
        info("lm_head.weight", 50),
        info("model.layers.0.q_proj.weight", 50),
    ]
    assert tied_copies(tensors, {"tie_word_embeddings": True}) == {"lm_head.weight"}
    assert tied_copies(tensors, {"text_config": {"tie_word_embeddings": True}}) == {"lm_head.weight"}
    assert tied_copies(tensors, {"tie_word_embeddings": False}) == set()
    assert tied_copies(tensors, None) == set()
    assert tied_copies([info("lm_head.weight", 60), *tensors[:1]], {"tie_word_embeddings": True}) == set()


def test_inner_lists_do_not_hide_the_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(2))})
    stack = find_blocks(model)
    assert stack.names == ("layers.0", "layers.1")
    assert set(linear_maps(stack.modules[0])) == {f"experts.{i}" for i in range(6)}
    keys = {(v.block, v.role) for v in views(open_source(model)) if not v.reason}
    assert keys == {(b, f"experts.{i}") for b in range(2) for i in range(6)}


def test_a_model_without_blocks_is_bad_input() -> None:
    with pytest.raises(BadInput, match="list of blocks"):
        find_blocks(nn.Linear(8, 8))


def test_blocks_of_a_wrapped_model_are_found() -> None:
    model = makers.tiny_llama(blocks=3)
    assert find_blocks(nn.ModuleDict({"module": model})).names[0] == "module.model.layers.0"
    assert find_blocks(model).prefix == "model.layers"

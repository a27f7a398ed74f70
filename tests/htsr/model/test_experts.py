"""LOD of mixtures of experts as files have them, and of models that no text can be run through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import makers
import pytest
import torch
from torch import nn

from htsr import scan as scan_function
from htsr.errors import BadInput
from htsr.model import calibration
from htsr.model.calibration import Calibration, calibrate
from htsr.model.layers import views
from htsr.model.open import open_source
from htsr.model.skeleton import CannotStreamError

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts_per_tok": 2,
}  # fmt: skip


def mixture(name: str) -> nn.Module:
    """A tiny random mixture of nine experts (or eight and a shared one)."""
    import transformers as tf

    many = {"num_local_experts": 9, "num_experts": 9, "moe_intermediate_size": 24}
    kinds: dict[str, Any] = {
        "mixtral": lambda: (tf.MixtralForCausalLM, tf.MixtralConfig(**SIZES, **many)),
        "qwen3": lambda: (tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**SIZES, **many, head_dim=8)),
        "olmoe": lambda: (tf.OlmoeForCausalLM, tf.OlmoeConfig(**SIZES, **many)),
        "llama4": lambda: (
            tf.Llama4ForCausalLM,
            tf.Llama4TextConfig(
                **SIZES, num_local_experts=9, head_dim=8, intermediate_size_mlp=40, interleave_moe_layer_step=1
            ),
        ),
        "deepseek": lambda: (
            tf.DeepseekV3ForCausalLM,
            tf.DeepseekV3Config(
                **{**SIZES, "num_key_value_heads": 4}, moe_intermediate_size=24, n_routed_experts=8, n_group=1,
                topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1,
            ),
        ),
    }  # fmt: skip
    kind, config = kinds[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.1).mul_(1 + 3 * torch.rand(parameter.shape[-1]) ** 6)
    return model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text("the rain in spain stays mainly in the plain, and so it goes on. " * 12)
    return path


def measure(model: Any, text: Path) -> Calibration:
    return calibrate(
        open_source(model), text, tau=3.0, samples=4, seq_len=24, tokenizer=makers.byte_tokenizer(), device="cpu"
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "olmoe", "llama4", "deepseek"])
def test_published_mixtures_stream_and_agree_with_the_loaded_model(
    name: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture(name)
    model.save_pretrained(tmp_path)  # the names of published files, which are not those in memory
    streamed = measure(tmp_path, text)
    assert streamed.route == "streamed"

    def refuse(*_: Any) -> Any:
        raise CannotStreamError("for the test")

    monkeypatch.setattr(calibration, "build_skeleton", refuse)
    loaded = measure(tmp_path, text)
    assert loaded.route == "run as a whole: for the test"
    assert streamed.matrices.keys() == loaded.matrices.keys()
    for key, expected in loaded.matrices.items():
        assert streamed.matrices[key].lod == pytest.approx(expected.lod, abs=1e-9), key
    assert max(block.lod for block in streamed.blocks.values()) > 0
    known = {(v.block, v.role) for v in views(open_source(tmp_path)) if v.block is not None and not v.reason}
    assert known <= streamed.matrices.keys()  # every matrix of the file has its LOD


def test_a_mixture_that_lacks_an_expert_is_not_streamed(tmp_path: Path) -> None:
    from htsr.model.skeleton import build_skeleton

    model = mixture("mixtral")
    state = {name: tensor for name, tensor in model.state_dict().items() if "experts" not in name}
    for block in range(2):
        for expert in range(8):
            for part, shape in (("w1", (24, 32)), ("w2", (32, 24)), ("w3", (24, 32))):
                state[f"model.layers.{block}.block_sparse_moe.experts.{expert}.{part}.weight"] = torch.zeros(shape)
    source = open_source(state)
    source.__dict__["config"] = model.config.to_dict()
    with pytest.raises(CannotStreamError, match="no tensor for parameter"):
        build_skeleton(source)


@pytest.mark.parametrize("name", ["whisper", "vit", "clip"])
def test_models_that_read_no_text_are_scanned_without_lod(name: str, tmp_path: Path, text: Path) -> None:
    import transformers as tf

    small = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 2}
    picture = {**small, "image_size": 16, "patch_size": 4}
    words = {**small, "vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    makes: dict[str, Any] = {
        "whisper": lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, num_mel_bins=8,
                max_source_positions=30, max_target_positions=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        "vit": lambda: tf.ViTModel(tf.ViTConfig(**picture)),
        "clip": lambda: tf.CLIPModel(tf.CLIPConfig(text_config=words, vision_config=picture, projection_dim=16)),
    }  # fmt: skip
    model = makes[name]()
    model.save_pretrained(tmp_path)
    makers.byte_tokenizer().save_pretrained(tmp_path)
    result = scan_function(tmp_path, seq_len=16, samples=2, quiet=True)
    assert result.frame["lod"].isna().all()
    assert result.provenance["lod_reason"]
    assert (result.frame["status"] == "ok").sum() >= 12
    assert result.blocks["alpha"].notna().all()
    with pytest.raises(BadInput):
        scan_function(tmp_path, calibration=text, seq_len=16, samples=2, quiet=True)

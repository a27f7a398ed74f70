"""Makers of small matrices and tiny models for the tests; everything is a function of its seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def tiny_llama(
    *,
    blocks: int = 4,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 48,
    vocab: int = 64,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> nn.Module:
    """A random Llama; weights are drawn large enough that a few steps change the loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
        **config,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(settings)
    return model.to(dtype)


def byte_tokenizer(vocab: int = 64) -> Any:
    """A tokenizer of single characters (ASCII 32.. folded into `vocab`), with <s>=1, </s>=2, <pad>=0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = " etaoinshrdlucmfwypvbgkjqxzETAOIN.,:?!0123456789#\n'\"-"
    pieces += list(characters)[: vocab - len(pieces)]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_tiny(directory: Path, model: nn.Module | None = None, **settings: Any) -> Path:
    """A Hugging Face directory (model and tokenizer) of `tiny_llama(**settings)`."""
    model = model if model is not None else tiny_llama(**settings)
    model.save_pretrained(directory)
    byte_tokenizer(model.config.vocab_size).save_pretrained(directory)
    return directory


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

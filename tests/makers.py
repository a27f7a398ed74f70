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


def bpe_tokenizer(*, spaced: bool = False, merges: int = 200) -> Any:
    """A BPE tokenizer with real merges: byte-level like GPT-2's, or `spaced` (a space before any text) like Llama's.

    The spaced one adds <s> to what it encodes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    text = ["the answer is true or false and the question is what the answer to the question is. "] * 20
    text += ["### Instruction:\nname the colour of the sky\n\n### Response:\nthe sky is blue\n\n"] * 20
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=spaced))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if spaced:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special += [f"<0x{i:02X}>" for i in range(256)]
        alphabet = list("▁" + "".join(chr(i) for i in range(33, 127)))
        text = [line for part in text for line in part.split("\n")]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    size = len(special) + len(alphabet) + merges
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(text, trainer)
    if spaced:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_models() -> dict[str, Any]:
    """Tiny random causal language models of several families, by name: makers that take a seed."""
    import transformers as t

    common = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }  # fmt: skip
    grouped = {**sizes, "num_key_value_heads": 2}
    gpt2 = {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}
    configs: dict[str, Any] = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**common, **grouped)),
        "llama-tied": (t.LlamaForCausalLM, t.LlamaConfig(**common, **grouped, tie_word_embeddings=True)),
        "mistral": (t.MistralForCausalLM, t.MistralConfig(**common, **grouped, sliding_window=8)),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**common, **grouped)),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config(**common, **grouped, head_dim=8)),
        "gemma": (t.GemmaForCausalLM, t.GemmaConfig(**common, **grouped, head_dim=8)),
        "gemma2": (
            t.Gemma2ForCausalLM,
            t.Gemma2Config(**common, **grouped, head_dim=8, final_logit_softcapping=5.0, sliding_window=8),
        ),
        "phi": (t.PhiForCausalLM, t.PhiConfig(**common, **sizes)),
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(**common, **gpt2)),
        "gpt-neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**common, **sizes)),
        "granite": (t.GraniteForCausalLM, t.GraniteConfig(**common, **grouped, logits_scaling=3.0)),
    }

    def maker(cls: Any, config: Any) -> Any:
        def make(seed: int = 0) -> nn.Module:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return cls(config).eval()

        return make

    return {name: maker(cls, config) for name, (cls, config) in configs.items()}


FAMILIES = (
    "llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "gpt2", "gpt-neox", "granite",
)  # fmt: skip


def scan_rows(**columns: list[object]) -> Any:
    """A frame like a scan's with these columns; the others are not computed."""
    import numpy as np
    import pandas as pd

    length = len(columns["tensor"])
    numbers = ("alpha", "alpha_sigma", "ks_d", "xmin", "alpha_hill", "alpha_hat", "log10_norm", "log10_spectral_norm",
               "lambda_max", "stable_rank", "entropy", "lod", "lod_weight", "seconds")  # fmt: skip
    filled = {name: columns.get(name, [np.nan] * length) for name in numbers}
    plain = {"role": "q", "rows": 10, "cols": 10, "dtype": "float32", "status": "ok", "reason": "", "n_tail": pd.NA}
    given = {name: columns.get(name, [value] * length) for name, value in plain.items()}
    frame = pd.DataFrame({"block": columns["block"], "tensor": columns["tensor"], **given, **filled})
    return frame.astype({"block": "Int64", "n_tail": "Int64", **dict.fromkeys(numbers, "float64")})


def ks_distances(x: Any) -> tuple[Any, Any]:
    """alpha_i and D_i of every candidate xmin of an ascending spectrum, from the formulas."""
    import numpy as np

    N = len(x)
    alphas, distances = np.ones(N - 1), np.ones(N - 1)
    for i in range(N - 1):
        n = N - i
        alphas[i] = 1 + n / (np.log(x[i:]).sum() - n * np.log(x[i]))
        distances[i] = np.abs(1 - (x[i:] / x[i]) ** (1 - alphas[i]) - np.arange(n) / n).max()
    return alphas, distances


def near_tie(y: Any, gap: float) -> Any:
    """An ascending spectrum whose two best candidates are about `gap` apart in D: y with its best xmin moved up."""
    import numpy as np

    low, high = 0.0, 0.5
    i = int(np.argmin(ks_distances(y)[1]))
    for _ in range(25):  # towards the next value, until another candidate takes over
        z = y.copy()
        z[i] = y[i] + (low + high) / 2 * (y[i + 1] - y[i])
        D = ks_distances(z)[1]
        best, second = np.sort(D)[:2]
        if int(np.argmin(D)) == i and second - best > gap:
            low = (low + high) / 2
        else:
            high = (low + high) / 2
    return z

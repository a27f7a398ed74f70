"""Models of known shapes with random bf16 weights, made a block at a time from a seed: memory and speed do not depend
on values, and a block can be made again wherever it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from owlore.kernels.seeds import generator_for

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32},
    "llama-3-8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8},
    "mistral-7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8},
    "llama-70b": {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                  "num_attention_heads": 64, "num_key_value_heads": 8},
    "small": {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 12,
              "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip


def config_of(shape: str, *, blocks: int | None = None) -> Any:
    from transformers import LlamaConfig

    settings = {**SHAPES[shape], "max_position_embeddings": 4096}
    if blocks is not None:
        settings["num_hidden_layers"] = blocks
    return LlamaConfig(**settings, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def skeleton(shape: str, device: torch.device, *, blocks: int | None = None) -> Any:
    """The model with blocks that hold nothing (one NaN a weight); everything else is made from the seed on `device`."""
    from transformers import LlamaForCausalLM

    config = config_of(shape, blocks=blocks)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        module = model.get_submodule(name)
        module.weight = nn.Parameter(made(f"{shape}.{name}", module.weight, device), requires_grad=False)
    for block in model.model.layers:
        put(block, {n: torch.full((), float("nan"), dtype=p.dtype, device=device).expand(p.shape)
                    for n, p in block.named_parameters()})  # fmt: skip
    return model.train().requires_grad_(False)


def made(name: str, like: Tensor, device: torch.device) -> Tensor:
    """A weight by its name: ones for a norm, else normal with deviation 0.02."""
    if device.type == "meta":
        return torch.empty_like(like, device=device)
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=like.dtype, device=device)
    stream = generator_for(0, "bench", name, device=device)
    values = torch.empty(like.shape, dtype=like.dtype, device=device)
    return values.normal_(0.0, 0.02, generator=stream)


class Made(Mapping[str, Tensor]):
    """The weights of one block by name inside it, each made when it is asked for, as if it were read from a file."""

    def __init__(self, shape: str, index: int, module: nn.Module, device: torch.device) -> None:
        self._prefix, self._device, self._like = f"{shape}.{index}", device, dict(module.named_parameters())

    def __getitem__(self, name: str) -> Tensor:
        return made(f"{self._prefix}.{name}", self._like[name], self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)


def block_weights(shape: str, index: int, module: nn.Module, device: torch.device) -> Mapping[str, Tensor]:
    """The weights of one block by name inside it."""
    return Made(shape, index, module, device)


def filled(shape: str, device: torch.device, *, blocks: int | None = None) -> Any:
    """The whole model on `device`."""
    model = skeleton(shape, device, blocks=blocks)
    for index, block in enumerate(model.model.layers):
        put(block, block_weights(shape, index, block, device))
    return model


def put(block: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let these be the block's parameters."""
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))

"""A model that is known by its configuration alone: its parts on the meta device, and what a sequence costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from htsr.console import quiet_libraries
from htsr.errors import BadInput, HtsrError
from htsr.model.locate import locate
from owlore.blocks import ModelParts, find_parts
from owlore.config import TrainConfig
from owlore.injection import InjectedAdapter
from owlore.models.loading import DTYPES
from owlore.plan.footprint import Footprint, measure_footprint
from owlore.strategies import PrepareContext, Strategy


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model known by its configuration: parts on the meta device and what a sequence costs.

    parameters: of the model alone; `injected` is what the method put into it.
    """

    parts: ModelParts
    parameters: int
    injected: InjectedAdapter | None
    footprint: Footprint
    dtype: torch.dtype
    hidden: int
    vocabulary: int
    positions: int | None


def model_spec(config: TrainConfig, device: str = "cpu", *, strategy: type[Strategy] = Strategy) -> ModelSpec:
    """The model that `config.model` names, without its weights, as the method prepares it.

    Raises: NotFound, BadInput (no configuration of a causal language model).
    """
    from transformers import AutoConfig

    path = locate(str(config.model))
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    try:
        with quiet_libraries():
            described = AutoConfig.from_pretrained(path.parent if gguf else path, **gguf)
        return spec_of_config(described, _dtype(config, described, bool(gguf), device), config, strategy)
    except HtsrError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{config.model} has no configuration of a causal language model: {error}") from error


def spec_of_config(described: Any, dtype: torch.dtype, config: TrainConfig, strategy: type[Strategy]) -> ModelSpec:
    """The shape of the model that a transformers configuration describes; no weights are made."""
    from transformers import AutoModelForCausalLM

    with quiet_libraries(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described, dtype=dtype)
    return spec_of_model(model, attn=config.attn, strategy=strategy, options=config.set or {}, packed=config.packing)


def spec_of_model(
    model: Any,
    *,
    attn: str = "sdpa",
    strategy: type[Strategy] = Strategy,
    options: Mapping[str, Any] | None = None,
    packed: bool = False,
) -> ModelSpec:
    """The shape of a model object, which the method prepares; its parameters may be on the meta device."""
    text = model.config.get_text_config()
    dtype = next(model.parameters()).dtype
    parameters = sum(p.numel() for p in model.parameters())
    start = PrepareContext(options=options or {}, seed=0)

    def names(toy: nn.Module) -> frozenset[str] | None:
        injected = strategy.prepare(toy, start)
        return None if injected is None else injected.trained

    prepare = names if strategy.adapts else None
    footprint = measure_footprint(model.config, dtype=dtype, attn=attn, prepare=prepare, packed=packed)
    injected = strategy.prepare(model, start)
    return ModelSpec(
        parts=find_parts(model),
        parameters=parameters,
        injected=injected,
        footprint=footprint,
        dtype=dtype,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None),
    )


def weight_bytes(model: nn.Module, injected: InjectedAdapter | None) -> int:
    """Bytes of the weights; with an adapter also of what it keeps in buffers (frozen first values, codes, indexes)."""
    held = _bytes(model.parameters())
    return held if injected is None else held + _bytes(stored_buffers(model)) - injected.saves_bytes


def stored_buffers(model: nn.Module) -> list[torch.Tensor]:
    """Buffers that belong to the state of a model; what it computes anew (rotary frequencies) is left out."""
    names = model.state_dict().keys()
    return [buffer for name, buffer in model.named_buffers() if name in names]


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _dtype(config: TrainConfig, described: Any, gguf: bool, device: str) -> torch.dtype:
    if config.weights == "fp32":
        return torch.float32
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if gguf:
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return getattr(described.get_text_config(), "dtype", None) or torch.float32

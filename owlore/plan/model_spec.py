"""A model that is known by its configuration alone: its units on the meta device, and what a sequence costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from htsr.console import quiet_libraries
from htsr.errors import BadInput, HtsrError
from htsr.model.locate import locate
from owlore.attach import Attached
from owlore.blocks import Units, find_units
from owlore.config import TrainConfig
from owlore.models.loading import DTYPES
from owlore.plan.footprint import Footprint, measure_footprint
from owlore.strategies import Start, Strategy


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model known by its configuration: units on the meta device and what a sequence costs.

    parameters: of the model alone; `attached` is what the method put into it.
    """

    units: Units
    parameters: int
    attached: Attached | None
    footprint: Footprint
    dtype: torch.dtype
    hidden: int
    vocabulary: int
    positions: int | None


def model_shape(config: TrainConfig, device: str = "cpu", *, strategy: type[Strategy] = Strategy) -> Shape:
    """The model that `config.model` names, without its weights, as the method prepares it.

    Raises: NotFound, BadInput (no configuration of a causal language model).
    """
    from transformers import AutoConfig

    path = locate(str(config.model))
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    try:
        with quiet_libraries():
            described = AutoConfig.from_pretrained(path.parent if gguf else path, **gguf)
        return shape_of_config(described, _dtype(config, described, bool(gguf), device), config, strategy)
    except HtsrError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{config.model} has no configuration of a causal language model: {error}") from error


def shape_of_config(described: Any, dtype: torch.dtype, config: TrainConfig, strategy: type[Strategy]) -> Shape:
    """The shape of the model that a transformers configuration describes; no weights are made."""
    from transformers import AutoModelForCausalLM

    with quiet_libraries(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described, dtype=dtype)
    return shape_of(model, attn=config.attn, strategy=strategy, own=config.set or {}, packed=config.packing)


def shape_of(
    model: Any,
    *,
    attn: str = "sdpa",
    strategy: type[Strategy] = Strategy,
    own: Mapping[str, Any] | None = None,
    packed: bool = False,
) -> Shape:
    """The shape of a model object, which the method prepares; its parameters may be on the meta device."""
    text = model.config.get_text_config()
    dtype = next(model.parameters()).dtype
    parameters = sum(p.numel() for p in model.parameters())
    start = Start(own=own or {}, seed=0)

    def names(toy: nn.Module) -> frozenset[str] | None:
        attached = strategy.prepare(toy, start)
        return None if attached is None else attached.trained

    prepare = names if strategy.adapts else None
    footprint = measure_footprint(model.config, dtype=dtype, attn=attn, prepare=prepare, packed=packed)
    attached = strategy.prepare(model, start)
    return Shape(
        units=find_units(model),
        parameters=parameters,
        attached=attached,
        footprint=footprint,
        dtype=dtype,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None),
    )


def weight_bytes(model: nn.Module, attached: Attached | None) -> int:
    """Bytes of the weights; with an adapter also of what it keeps in buffers (frozen first values, codes, indexes)."""
    held = _bytes(model.parameters())
    return held if attached is None else held + _bytes(stored_buffers(model)) - attached.saves_bytes


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

"""A model that is known by its configuration alone: its parts on the meta device, and what a sequence costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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
    """A model known by its configuration, without its weights.

    Attributes:
        parts: the model's parts, on the meta device, with what the method put into it.
        parameters: number of parameters of the model alone.
        injected: the adapter that the method put into it; None where it trains the model's own weights.
        footprint: bytes that autograd saves for a sequence.
        dtype: dtype of the weights.
        hidden: size of the hidden states.
        vocabulary: rows of the embedding table.
        positions: most tokens of a sequence; None where the configuration names no limit.
    """

    parts: ModelParts
    parameters: int
    injected: InjectedAdapter | None
    footprint: Footprint
    dtype: torch.dtype
    hidden: int
    vocabulary: int
    positions: int | None


def model_files(config: TrainConfig) -> tuple[Path, dict[str, str]]:
    """Where the files of `config.model` are: a directory, and the keywords by which transformers finds a GGUF in it.

    Args:
        config: the settings.

    Raises:
        NotFound: there is no such model.
    """
    path = locate(str(config.model))
    return (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})


def spec_of_files(config: TrainConfig, device: str, *, strategy: type[Strategy]) -> ModelSpec:
    """Describe the model that `config.model` names, as the method prepares it.

    Args:
        config: the settings.
        device: type of the device that it would be trained on; the dtype of a GGUF depends on it.
        strategy: the method.

    Raises:
        NotFound: there is no such model.
        BadInput: it has no configuration of a causal language model.
    """
    from transformers import AutoConfig

    directory, gguf = model_files(config)
    try:
        with quiet_libraries():
            described = AutoConfig.from_pretrained(directory, **gguf)
        return spec_of_config(described, _dtype(config, described, bool(gguf), device), config, strategy)
    except HtsrError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{config.model} has no configuration of a causal language model: {error}") from error


def spec_of_config(described: Any, dtype: torch.dtype, config: TrainConfig, strategy: type[Strategy]) -> ModelSpec:
    """Describe the model of a transformers configuration; no weights are made.

    Args:
        described: the transformers configuration.
        dtype: dtype of the weights.
        config: the settings.
        strategy: the method.
    """
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
    """Describe a model object, into which the method's adapter is put.

    Args:
        model: the model; its parameters may be on the meta device.
        attn: attention implementation.
        strategy: the method.
        options: the method's own options by name.
        packed: whether sequences hold several rows.
    """
    text = model.config.get_text_config()
    dtype = next(model.parameters()).dtype
    parameters = sum(p.numel() for p in model.parameters())
    context = PrepareContext(options=options or {}, seed=0)

    def trained_names(toy: nn.Module) -> frozenset[str] | None:
        injected = strategy.prepare(toy, context)
        return None if injected is None else injected.trained

    prepare = trained_names if strategy.adapts else None
    footprint = measure_footprint(model.config, dtype=dtype, attn=attn, prepare=prepare, packed=packed)
    injected = strategy.prepare(model, context)
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
    """Bytes of the weights; with an adapter also of the buffers that belong to the model's state.

    An adapter keeps its first values, codes and indexes in buffers. Buffers that are computed anew (rotary frequencies)
    are not counted.

    Args:
        model: the model; its parameters may be on the meta device.
        injected: the adapter in it, if any.
    """
    tensors: list[torch.Tensor] = list(model.parameters())
    if injected is not None:
        names = model.state_dict().keys()
        tensors += [buffer for name, buffer in model.named_buffers() if name in names]
    held = sum(tensor.nbytes for tensor in tensors)
    return held if injected is None else held - injected.saves_bytes


def _dtype(config: TrainConfig, described: Any, gguf: bool, device: str) -> torch.dtype:
    if config.weights == "fp32":
        return torch.float32
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if gguf:
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return getattr(described.get_text_config(), "dtype", None) or torch.float32

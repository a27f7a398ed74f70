"""Loading a model without its blocks, for models larger than memory: of a block only names, shapes and dtypes are read.

A model whose weights have to be converted (GGUF, quantised weights, stacks of experts that a file stores one by one)
cannot be loaded in this way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from htsr.console import quiet_libraries
from htsr.model.safetensors_files import SafetensorsSource
from htsr.model.skeleton import CannotStreamError, EmptyOnMeta
from htsr.model.source import Source, TensorInfo
from owlore.blocks import find_parts
from owlore.residency.binding import placeholder


def open_on_meta(
    source: Source, directory: Path, *, dtype: torch.dtype | None, attn: dict[str, str]
) -> tuple[Any, dict[str, str]]:
    """Load a model on the CPU, with placeholders (one NaN, expanded) as the parameters of its blocks.

    Args:
        source: The checkpoint.
        directory: Its directory, with the configuration.
        dtype: Dtype of the model; None takes the checkpoint's.
        attn: Arguments of transformers for the attention implementation.

    Returns:
        The model in evaluation mode, and the name of each parameter's tensor in the source by the parameter's name.

    Raises:
        CannotStreamError: The blocks cannot be left in their files; the message says why.
    """
    if not isinstance(source, SafetensorsSource):
        raise CannotStreamError("its weights are not plain safetensors")
    if (source.config or {}).get("quantization_config"):
        raise CannotStreamError("its weights are stored quantised")
    model = _empty_model(source, directory, dtype, attn)
    origins = _origins(model, source)
    inside = find_parts(model).block_of()
    held: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the empty one is kept, so that its id is not reused
    for name, empty in list(model.named_parameters(remove_duplicate=False)):
        if id(empty) not in held:
            if name in inside:
                values = placeholder(empty.data, torch.device("cpu"))
            else:
                values = source.read(origins[name]).to(empty.dtype)
            held[id(empty)] = (empty, nn.Parameter(values, requires_grad=False))
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, held[id(empty)][1])
    _read_buffers(model, source)
    return model.eval(), origins


def _empty_model(source: SafetensorsSource, directory: Path, dtype: torch.dtype | None, attn: dict[str, str]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with quiet_libraries():
        config = AutoConfig.from_pretrained(directory)
        wanted = dtype or getattr(config.get_text_config(), "dtype", None) or _only_dtype(source)
        with EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, **attn)
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
    wide = getattr(model, "_keep_in_fp32_modules_strict", None) if wanted != torch.float32 else None
    if wide or (wanted == torch.float16 and getattr(model, "_keep_in_fp32_modules", None)):
        raise CannotStreamError(f"some of its modules stay in float32 under {wanted}")
    return model


def _only_dtype(source: Source) -> torch.dtype:
    found = {tensor.dtype for tensor in source.tensors if tensor.dtype.startswith(("float", "bfloat"))}
    if len(found) != 1:
        raise CannotStreamError(
            f"its configuration names no dtype and its tensors have {len(found)}; name one with --dtype"
        )
    return getattr(torch, found.pop())


def _origins(model: Any, source: SafetensorsSource) -> dict[str, str]:
    """The tensor of each parameter, found by name and shape; names may have the prefix of the base model or lack it."""
    stored = {tensor.name: tensor for tensor in source.tensors}
    copies = copies_of(source)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    origins = {}
    for name, parameter in model.named_parameters():
        found = next((t for alias in aliases[id(parameter)] for t in candidates(model, alias) if t in stored), None)
        if found is None:
            raise CannotStreamError(f"the files have no tensor for {name}")
        if tuple(stored[found].shape) != tuple(parameter.shape) or not stored[found].readable:
            raise CannotStreamError(
                f"the files have {stored[found].dtype} {stored[found].shape} for {name}, the model "
                f"{tuple(parameter.shape)}"
            )
        origins[name] = found
    for copy in copies:
        # A head that is stored although it is tied must have the same values.
        alike = [t for t in origins.values() if stored[t].shape == copies[copy].shape]
        if not any(all(a == b for a, b in zip(source.raw(copy), source.raw(t), strict=True)) for t in alike):
            raise CannotStreamError(f"{copy} is tied by the configuration but has other values in the file")
    return origins


def copies_of(source: SafetensorsSource) -> dict[str, TensorInfo]:
    """Tensors of the files that are copies of tied weights, by name."""
    known = {tensor.name for tensor in source.tensors}
    stored = (entry.info for entries in source.files.values() for entry in entries)
    return {info.name: info for info in stored if info.name not in known}


def candidates(model: Any, name: str) -> tuple[str, ...]:
    """Names that a checkpoint may have for the model's tensor `name`."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return (name, prefix + name, name.removeprefix(prefix))


def _read_buffers(model: Any, source: Source) -> None:
    """Read the buffers that are saved with the weights; the others were computed when the model was made."""
    stored = {tensor.name for tensor in source.tensors}
    kept = model.state_dict().keys()
    for name, buffer in list(model.named_buffers()):
        found = next((t for t in candidates(model, name) if t in stored), None) if name in kept else None
        if found is not None:
            buffer.copy_(source.read(found))
        elif buffer.is_meta:
            raise CannotStreamError(f"buffer {name} is only made by the model's loading code")

"""A model whose blocks stay in their files: everything else is read, of a block only names, shapes and dtypes.

For models larger than the memory at hand. What would have to be converted on the way (GGUF, quantised weights, stacks
of experts that a file holds one by one) cannot be left where it is; such a model is read as a whole.
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
    source: Source, place: Path, *, dtype: torch.dtype | None, attn: dict[str, str]
) -> tuple[Any, dict[str, str]]:
    """(model in evaluation mode, name of every parameter -> name of its tensor in the source).

    Blocks' parameters hold nothing (one NaN, expanded); all others hold their weights, on the CPU. dtype: None is the
    checkpoint's.

    Raises: CannotStreamError, whose text says why the blocks cannot stay where they are.
    """
    if not isinstance(source, SafetensorsSource):
        raise CannotStreamError("its weights are not plain safetensors")
    if (source.config or {}).get("quantization_config"):
        raise CannotStreamError("its weights are stored quantised")
    model = _empty_model(source, place, dtype, attn)
    origins = _origins(model, source)
    inside = find_parts(model).block_of()
    held: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the bare parameter is kept, so that no id is used twice
    for name, bare in list(model.named_parameters(remove_duplicate=False)):
        if id(bare) not in held:
            first = bare.data
            values = (
                placeholder(first, torch.device("cpu"))
                if name in inside
                else source.read(origins[name]).to(first.dtype)
            )
            held[id(bare)] = (bare, nn.Parameter(values, requires_grad=False))
        _place(model, name, held[id(bare)][1])
    _read_buffers(model, source)
    return model.eval(), origins


def _empty_model(source: SafetensorsSource, place: Path, dtype: torch.dtype | None, attn: dict[str, str]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with quiet_libraries():
        config = AutoConfig.from_pretrained(place)
        wanted = dtype or getattr(config.get_text_config(), "dtype", None) or _only_dtype(source)
        with EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, **attn)
        if (place / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(place)
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
    """Parameter -> tensor, by name and shape; a checkpoint may lack or add the name of the model's base in front."""
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
                f"the files hold {_shown(stored[found])} for {name}, the model {tuple(parameter.shape)}"
            )
        origins[name] = found
    for copy in copies:
        # A head that is stored although it is tied has to be what it is tied to.
        alike = [t for t in origins.values() if stored[t].shape == copies[copy].shape]
        if not any(all(a == b for a, b in zip(source.raw(copy), source.raw(t), strict=True)) for t in alike):
            raise CannotStreamError(f"{copy} is tied by the configuration and another tensor in the file")
    return origins


def copies_of(source: SafetensorsSource) -> dict[str, TensorInfo]:
    """Tensors of the files that repeat tied weights, by name."""
    known = {tensor.name for tensor in source.tensors}
    stored = (entry.info for entries in source.files.values() for entry in entries)
    return {info.name: info for info in stored if info.name not in known}


def candidates(model: Any, name: str) -> tuple[str, ...]:
    """What a tensor of a checkpoint may be called that the model knows as `name`."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return (name, prefix + name, name.removeprefix(prefix))


def _read_buffers(model: Any, source: Source) -> None:
    """Buffers that belong to the weights; the others were computed with the model."""
    stored = {tensor.name for tensor in source.tensors}
    kept = model.state_dict().keys()
    for name, buffer in list(model.named_buffers()):
        found = next((t for t in candidates(model, name) if t in stored), None) if name in kept else None
        if found is not None:
            buffer.copy_(source.read(found))
        elif buffer.is_meta:
            raise CannotStreamError(f"buffer {name} is only known to the model's own loading code")


def _place(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)


def _shown(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} {tensor.shape}"

"""Loading a model to train and its tokenizer from an id, a directory, a GGUF file or an object in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from htsr import devices
from htsr.console import quiet_libraries, silence_stderr
from htsr.errors import BadInput, UsageError, first_line
from htsr.model.locate import locate
from htsr.model.open import open_source
from htsr.model.skeleton import CannotStreamError
from htsr.model.source import Source
from owlore.injection import holds_adapter, is_adapter
from owlore.models.meta_loading import open_on_meta

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model on its device, and where it came from.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        source: The checkpoint, from which tensors that were not trained can be read again.
        id: Name of the model.
        revision: Its revision on the Hub, or None.
        weights_sha256: Digest of the weights.
        config_sha256: Digest of the configuration, or None.
        stored: Dtype of each tensor in the checkpoint by name, in which it is exported.
        stored_default: Dtype in which tensors are exported that the checkpoint does not have.
        parameters: Number of parameters, without those that a method adds.
        reference: An id or an absolute path from which the model can be loaded again.
        origins: If the blocks were left in their files, the tensor of each parameter by the parameter's name.
    """

    model: Any
    tokenizer: Any
    source: Source
    id: str
    revision: str | None
    weights_sha256: str
    config_sha256: str | None
    stored: dict[str, torch.dtype]
    stored_default: torch.dtype
    parameters: int
    reference: str
    origins: Mapping[str, str] = field(default_factory=dict)


def pick_device(name: str) -> torch.device:
    """The device of `htsr.devices.pick_device`, as a torch.device."""
    return torch.device(devices.pick_device(name))


def load(
    model: Any,
    *,
    dtype: str,
    attn: str,
    device: torch.device,
    tokenizer: Any = None,
    leave: Callable[[str], None] | None = None,
) -> Loaded:
    """Load a causal language model, or prepare one that is given as an object.

    Args:
        model: Hugging Face id, directory, `.gguf` file, `demo`, or an `nn.Module`.
        dtype: A key of `DTYPES`, or "auto" for the checkpoint's dtype; for a GGUF file "auto" is bfloat16 on CUDA and
            float32 on the CPU.
        attn: Attention implementation of transformers.
        device: Where the model is put.
        tokenizer: The tokenizer; None loads the model's.
        leave: If given, the blocks are left in their files (on the CPU, see `Loaded.origins`). It is called with the
            reason if that is not possible.

    Raises:
        NotFound: The model does not exist.
        BadInput: It cannot be used as a causal language model.
        UsageError: A module has no tokenizer, or the model does not support `attn`.
    """
    source = open_source(model)
    if isinstance(model, nn.Module):
        if leave is not None:
            leave("note: the model is an object in memory; its blocks are moved from there to the host, one at a time")
        return _adopt(model, source, dtype, device, tokenizer)
    return _read(model, source, dtype, attn, device, tokenizer, leave)


def _adopt(model: nn.Module, source: Source, dtype: str, device: torch.device, tokenizer: Any) -> Loaded:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if tokenizer is None:
        tokenizer = _tokenizer_of(name)
    if holds_adapter(model):
        raise BadInput(
            "the model has an adapter's layers, expected a plain model: call merge_and_unload() or unload() of PEFT's "
            "model and pass the result"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise BadInput("the model was made inside torch.inference_mode, expected weights that can be trained")
    before = next(model.parameters()).dtype
    target = before if dtype == "auto" else DTYPES[dtype]
    stored = {name: p.dtype for name, p in model.named_parameters()}
    for parameter in model.parameters():  # not buffers: rotary frequencies are fp32 also in a model of 16-bit weights
        parameter.data = parameter.data.to(target)
    return _loaded(model.to(device=device), tokenizer, source, stored, before, name)


def _read(
    ref: str | Path,
    source: Source,
    dtype: str,
    attn: str,
    device: torch.device,
    tokenizer: Any,
    leave: Callable[[str], None] | None,
) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = locate(ref)
    if path.is_file() and path.suffix != ".gguf":
        raise BadInput(f"{ref} is a single weights file; training needs its directory with config.json and tokenizer")
    if is_adapter(path):
        raise BadInput(
            f"{ref} is an adapter, expected a model: make one of it and its base with `owlore merge {ref} -o DIR`"
        )
    gguf = {"gguf_file": path.name} if path.is_file() else {}
    directory = path.parent if path.is_file() else path
    wanted: Any = "auto" if dtype == "auto" else DTYPES[dtype]
    if gguf and dtype == "auto":
        wanted = torch.bfloat16 if device.type == "cuda" else torch.float32
    missing: Iterable[str] = ()
    try:
        # transformers shows a progress bar while it dequantises, even without a terminal.
        with quiet_libraries(), silence_stderr() if gguf else nullcontext():
            model, origins = _without_blocks(ref, source, directory, DTYPES.get(dtype), attn, leave)
            if model is None:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    directory, dtype=wanted, output_loading_info=True, **attention(attn), **gguf
                )
                model, info = loaded
                missing = info["missing_keys"]
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(directory, **gguf)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if attn != "sdpa" and "attention" in str(error).lower():
            raise UsageError(f"--attn {attn}: {first_line(error)}") from error
        raise BadInput(f"{ref} cannot be loaded as a causal language model: {first_line(error)}") from error
    _check_complete(ref, missing)
    if gguf:
        model = without_quantisation(model)
    known = {t.name: DTYPES[t.dtype] for t in source.tensors if t.dtype in DTYPES}
    default = model.dtype if gguf else DTYPES.get(str(source.config and source.config.get("dtype")), model.dtype)
    found = _loaded(model.to(device), tokenizer, source, {} if gguf else known, default, _reference(ref))
    return replace(found, origins=origins)


def _check_complete(ref: str | Path, missing: Iterable[str]) -> None:
    """Check that no tensor is missing, since transformers would initialise it at random.

    Raises:
        BadInput: Tensors are missing.
    """
    if names := sorted(missing):
        raise BadInput(
            f"{ref} holds no {names[0]}" + (f" and {len(names) - 1} more tensors" if names[1:] else "") + ", which a "
            "causal language model of its configuration has: expected a complete one (not an encoder, nor a part)"
        )


def _without_blocks(
    ref: str | Path,
    source: Source,
    directory: Path,
    dtype: torch.dtype | None,
    attn: str,
    leave: Callable[[str], None] | None,
) -> tuple[Any, dict[str, str]]:
    """The model with its blocks left in their files, and the origins; None if that is not wanted or not possible."""
    if leave is not None:
        try:
            return open_on_meta(source, directory, dtype=dtype, attn=attention(attn))
        except CannotStreamError as why:
            leave(f"note: all of {ref} is read into host memory: {why}")
    return None, {}


def _reference(ref: str | Path) -> str:
    """An absolute path for a path, which does not depend on the working directory; an id is returned as it is."""
    path = Path(ref).expanduser()
    return str(path.resolve()) if path.exists() else str(ref)


def attention(name: str) -> dict[str, str]:
    """The argument of transformers for an attention implementation; none for "sdpa".

    SDPA is the default of every model that supports it, and naming it would be an error for other models.
    """
    return {} if name == "sdpa" else {"attn_implementation": name}


def without_quantisation(model: Any) -> Any:
    """The same weights in a plain model: a model loaded from GGUF counts as quantised and cannot be saved."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)._from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), strict=True, assign=True)
    for name, buffer in model.named_buffers():
        _set_buffer(plain, name, buffer)
    plain.tie_weights()
    if model.generation_config is not None:
        plain.generation_config = model.generation_config
    return plain.eval()


def _set_buffer(model: nn.Module, name: str, buffer: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    owner.register_buffer(leaf, buffer, persistent=leaf not in owner._non_persistent_buffers_set)


def _tokenizer_of(name: str) -> Any:
    from transformers import AutoTokenizer

    if not name:
        raise UsageError("a model object without a name was given, expected tokenizer= beside it")
    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"no tokenizer found for the model object ({name}): pass tokenizer=") from error


def _loaded(
    model: Any,
    tokenizer: Any,
    source: Source,
    stored: dict[str, torch.dtype],
    default: torch.dtype,
    reference: str,
) -> Loaded:
    if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        raise BadInput("got weights in float64, expected float32, bfloat16 or float16: --dtype float32 converts them")
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        source=source,
        id=source.id,
        revision=source.revision,
        weights_sha256=source.weights_sha256(),
        config_sha256=source.config_sha256(),
        stored=stored,
        stored_default=default,
        parameters=sum(p.numel() for p in model.parameters()),
        reference=reference,
    )

"""A model to train and its tokenizer, from an id, a directory, a GGUF file or an object in memory."""

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
    """A model on its device, and what an export and a report have to know about where it came from.

    source: the checkpoint, from which tensors that were never trained can be read again. stored: dtype of each tensor
    in it by name (what an export goes back to); `stored_default` for names that it does not have. parameters: of the
    model as it was loaded, without what a method adds. reference: what names the same model to a later reader.
    origins: where the blocks were left in their files, the tensor of every parameter by the parameter's name.
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
    """`htsr.devices.pick_device` as a torch.device."""
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
    """Load (or take over) a causal language model.

    model: Hugging Face id, directory, `.gguf` file, `demo`, or an `nn.Module`. dtype: `auto` is the checkpoint's; of a
    GGUF file bfloat16 on CUDA and float32 on the CPU. leave: do not read the blocks (on the CPU; `Loaded.origins` says
    where they are); told why where that cannot be.

    Raises: NotFound, BadInput (cannot be used as a causal language model), UsageError (a module without a tokenizer).
    """
    source = open_source(model)
    if isinstance(model, nn.Module):
        if leave is not None:
            leave(
                "note: the model is an object in memory; its blocks move from there into the store, one after another"
            )
        return _adopt(model, source, dtype, device, tokenizer)
    return _read(model, source, dtype, attn, device, tokenizer, leave)


def _adopt(model: nn.Module, source: Source, dtype: str, device: torch.device, tokenizer: Any) -> Loaded:
    if tokenizer is None:
        tokenizer = _tokenizer_of(getattr(getattr(model, "config", None), "_name_or_path", ""))
    if holds_adapter(model):
        raise BadInput(
            "the model holds an adapter's layers, expected a plain one: take what PEFT's model around it gives by "
            "merge_and_unload(), or unload()"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise BadInput("the model was made inside torch.inference_mode, expected weights that can be trained")
    own = next(model.parameters()).dtype
    target = own if dtype == "auto" else DTYPES[dtype]
    stored = {name: p.dtype for name, p in model.named_parameters()}
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    for parameter in model.parameters():  # buffers stay: rotary frequencies are fp32 in a model of 16-bit weights too
        parameter.data = parameter.data.to(target)
    return _loaded(model.to(device=device), tokenizer, source, stored, own, name)


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
        raise BadInput(f"{ref} is a lone weights file; training needs its directory with config.json and tokenizer")
    if is_adapter(path):
        raise BadInput(
            f"{ref} is an adapter, expected a model: make one of it and its base with `owlore merge {ref} -o DIR`"
        )
    gguf = {"gguf_file": path.name} if path.is_file() else {}
    place = path.parent if path.is_file() else path
    wanted: Any = "auto" if dtype == "auto" else DTYPES[dtype]
    if gguf and dtype == "auto":
        wanted = torch.bfloat16 if device.type == "cuda" else torch.float32
    missing: Iterable[str] = ()
    try:
        # transformers draws a bar of its own while it dequantises, terminal or not.
        with quiet_libraries(), silence_stderr() if gguf else nullcontext():
            model, origins = _without_blocks(ref, source, place, DTYPES.get(dtype), attn, leave)
            if model is None:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    place, dtype=wanted, output_loading_info=True, **attention(attn), **gguf
                )
                model, told = loaded
                missing = told["missing_keys"]
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(place, **gguf)
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
    """Raises: BadInput for a model that the weights do not fill; transformers draws what is missing at random."""
    if names := sorted(missing):
        raise BadInput(
            f"{ref} holds no {names[0]}" + (f" and {len(names) - 1} more tensors" if names[1:] else "") + " of what a "
            "causal language model of its configuration has: expected a complete one (not an encoder, nor a part)"
        )


def _without_blocks(
    ref: str | Path,
    source: Source,
    place: Path,
    dtype: torch.dtype | None,
    attn: str,
    leave: Callable[[str], None] | None,
) -> tuple[Any, dict[str, str]]:
    """The model with its blocks left where they are, None where they are not to be or cannot be."""
    if leave is not None:
        try:
            return open_on_meta(source, place, dtype=dtype, attn=attention(attn))
        except CannotStreamError as why:
            leave(f"note: {ref} is read into host memory as a whole: {why}")
    return None, {}


def _reference(ref: str | Path) -> str:
    """A path as an absolute one, so that it means the same from elsewhere; an id stays an id."""
    path = Path(ref).expanduser()
    return str(path.resolve()) if path.exists() else str(ref)


def attention(name: str) -> dict[str, str]:
    """The argument that asks transformers for an attention implementation.

    SDPA is what it takes by itself wherever a model has it; asking for it would refuse the models that have not.
    """
    return {} if name == "sdpa" else {"attn_implementation": name}


def without_quantisation(model: Any) -> Any:
    """The same weights in a plain model: one loaded from GGUF still counts as quantised and refuses to be saved."""
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

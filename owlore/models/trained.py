"""Loading a trained model: a run directory, an exported model, an adapter on its base, a GGUF file, or an id."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from htsr.console import quiet_libraries
from htsr.errors import BadInput, first_line
from owlore.injection import CONFIG_FILE, is_adapter
from owlore.io.finished_run import refuse_unfinished
from owlore.models.loading import Loaded, load


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model ready to be used.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        sha256: Digest of its weights, and of the adapter's files.
    """

    model: Any
    tokenizer: Any
    sha256: str


def load_trained(ref: str | Path, *, device: torch.device, dtype: str = "auto", attn: str = "sdpa") -> TrainedModel:
    """Load a model for evaluation or generation.

    Args:
        ref: What `owlore.models.loading.load` takes, a run directory, or an adapter directory, which is loaded on the
            base model that it names.
        device: Where the model is put.
        dtype: A key of `owlore.models.loading.DTYPES`, or "auto".
        attn: Attention implementation of transformers.

    Raises:
        NotFound: As `owlore.models.loading.load`.
        BadInput: As `owlore.models.loading.load`; the run has not finished; the adapter does not fit its base.
    """
    exported = Path(ref) / "model"
    if (exported / "config.json").is_file() or is_adapter(exported):
        ref = exported
    else:
        refuse_unfinished(Path(ref))
    if not is_adapter(ref):
        loaded = load(str(ref), dtype=dtype, attn=attn, device=device)
        return TrainedModel(model=loaded.model.eval(), tokenizer=loaded.tokenizer, sha256=loaded.weights_sha256)
    loaded, model = adapter_on_base(Path(ref), device=device, dtype=dtype, attn=attn)
    digest = hashlib.sha256(loaded.weights_sha256.encode())
    for file in sorted(Path(ref).glob("adapter_*")):
        digest.update(file.read_bytes())
    return TrainedModel(model=model, tokenizer=loaded.tokenizer, sha256=digest.hexdigest())


def adapter_on_base(
    directory: Path, *, device: torch.device, dtype: str = "auto", attn: str = "sdpa", quantised: bool = True
) -> tuple[Loaded, Any]:
    """Load the base model that an adapter directory names, and the adapter on it.

    Args:
        directory: The adapter directory.
        device: Where the model is put.
        dtype: A key of `owlore.models.loading.DTYPES`, or "auto".
        attn: Attention implementation of transformers.
        quantised: False does not quantise the base of an adapter that was trained on a base in four bits.

    Returns:
        The base, and PEFT's model in evaluation mode.

    Raises:
        BadInput: The adapter names no base, or does not fit it.
    """
    from peft import PeftConfig, PeftModel

    import owlore.adapters  # noqa: F401 - registers SMT and DoTA with PEFT

    base = base_of(directory)
    loaded = load(base, dtype=dtype, attn=attn, device=device)
    try:
        with quiet_libraries():
            config = PeftConfig.from_pretrained(str(directory))
            if not quantised and getattr(config, "quantise", None):
                config.quantise = None
            model = PeftModel.from_pretrained(loaded.model, directory, config=config)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise BadInput(f"{directory} cannot be loaded on its base {base}: {first_line(error)}") from error
    return loaded, model.eval()


def base_of(directory: Path) -> str:
    """The base model that an adapter directory names.

    Raises:
        BadInput: It names none.
    """
    file = directory / CONFIG_FILE
    try:
        base = json.loads(file.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file} does not name a base model; expected PEFT's file") from error
    if not isinstance(base, str) or not base:
        raise BadInput(f"{file} names {base!r} as base model, expected an id or a path")
    return base

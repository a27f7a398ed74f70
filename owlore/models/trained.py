"""A model as training left it: a run directory, an exported model, an adapter on its base, a GGUF file, or an id."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from htsr.console import quiet_libraries
from htsr.errors import BadInput, first_line
from owlore.io.finished_run import refuse_unfinished
from owlore.models.loading import Loaded, load


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model ready to be used, its tokenizer, and a digest of everything that its weights are made of."""

    model: Any
    tokenizer: Any
    sha256: str


def load_trained(ref: str | Path, *, device: torch.device, dtype: str = "auto", attn: str = "sdpa") -> TrainedModel:
    """Load what `ref` names; the model of a run directory, and an adapter on the base that it names.

    Raises: NotFound, BadInput as `owlore.models.loading.load`; BadInput for an adapter that does not fit its base.
    """
    place = place_of(ref)
    if place == str(ref):
        refuse_unfinished(Path(ref))
    if not (Path(place) / "adapter_config.json").is_file():
        loaded = load(place, dtype=dtype, attn=attn, device=device)
        return TrainedModel(model=loaded.model.eval(), tokenizer=loaded.tokenizer, sha256=loaded.weights_sha256)
    return _with_adapter(Path(place), device, dtype, attn)


def place_of(ref: str | Path) -> str:
    """The directory to load: `model/` of a run directory, else what was named."""
    exported = Path(ref) / "model"
    held = any((exported / name).is_file() for name in ("config.json", "adapter_config.json"))
    return str(exported) if held else str(ref)


def _with_adapter(place: Path, device: torch.device, dtype: str, attn: str) -> TrainedModel:
    loaded, model = adapter_on_base(place, device=device, dtype=dtype, attn=attn)
    digest = hashlib.sha256(loaded.weights_sha256.encode())
    for file in sorted(place.glob("adapter_*")):
        digest.update(file.read_bytes())
    return TrainedModel(model=model, tokenizer=loaded.tokenizer, sha256=digest.hexdigest())


def adapter_on_base(
    place: Path, *, device: torch.device, dtype: str = "auto", attn: str = "sdpa", quantised: bool = True
) -> tuple[Loaded, Any]:
    """The base that an adapter directory names, and PEFT's model of the adapter on it, in evaluation mode.

    quantised: False leaves a base in full precision that the adapter was trained on in four bits.

    Raises: BadInput when the adapter names no base or does not fit it.
    """
    from peft import PeftConfig, PeftModel

    register_own_adapters()
    base = base_of(place)
    loaded = load(base, dtype=dtype, attn=attn, device=device)
    try:
        with quiet_libraries():
            config = PeftConfig.from_pretrained(str(place))
            if not quantised and getattr(config, "quantise", None):
                config.quantise = None
            model = PeftModel.from_pretrained(loaded.model, place, config=config)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise BadInput(f"{place} cannot be put on its base {base}: {first_line(error)}") from error
    return loaded, model.eval()


def base_of(place: Path) -> str:
    """The model that an adapter directory names as its base.

    Raises: BadInput when it names none.
    """
    try:
        base = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{place}/adapter_config.json does not name a base model; expected PEFT's file") from error
    if not isinstance(base, str) or not base:
        raise BadInput(f"{place}/adapter_config.json names {base!r} as base model, expected an id or a path")
    return base


def register_own_adapters() -> None:
    """Make PEFT know the adapters of this package, where it has some."""
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec("owlore.adapters") is not None:
        import_module("owlore.adapters")

"""From what a user names to the source that reads it: a directory, a .safetensors or .gguf file, a Hub id, a module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from htsr.errors import BadInput
from htsr.model.adapter import AdapterSource
from htsr.model.delta import against
from htsr.model.gguf_file import GgufSource
from htsr.model.locate import is_hub_id, locate, snapshot_revision
from htsr.model.safetensors_files import SafetensorsSource
from htsr.model.source import Source

if TYPE_CHECKING:
    import torch
    from torch import nn


def open_source(
    model: str | Path | nn.Module | Mapping[str, torch.Tensor],
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    base: str | Path | nn.Module | Mapping[str, torch.Tensor] | None = None,
) -> Source:
    """Open a model for reading; no weights are read for this.

    Args:
        model: `demo`, a directory, a file, a Hugging Face id, an nn.Module or a state dict.
        revision: branch, tag or commit of an id.
        allow_pickle: accepts pickled weights.
        base: opens the difference to this model instead or, for an adapter, this model with the adapter merged into it.

    Raises:
        NotFound: there is no such path or id.
        BadInput: the model is there and cannot be used.
    """
    if base is not None:
        source = open_source(model, revision=revision, allow_pickle=allow_pickle)
        return against(source, open_source(base, allow_pickle=allow_pickle))
    if isinstance(model, str | Path):
        return _open_path(model, locate(model, revision, allow_pickle=allow_pickle), allow_pickle)
    from htsr.model.memory import ModuleSource

    return ModuleSource(model)


def _open_path(model: str | Path, path: Path, allow_pickle: bool) -> Source:
    named = str(model)
    hub = is_hub_id(named) and not Path(named).expanduser().exists()
    id_ = named if named == "demo" or hub else (path.name or path.resolve().name)
    revision = snapshot_revision(path)
    if path.is_file():
        match path.suffix:
            case ".safetensors":
                return SafetensorsSource(path, id_, revision)
            case ".gguf":
                return GgufSource(path, id_)
            case ".bin" | ".pt" | ".pth" | ".ckpt":
                return _open_pickle([path], path, id_, revision, allow_pickle)
        raise BadInput(
            f"{path.name}: got a {path.suffix or 'nameless'} file, expected .safetensors, .gguf or a directory"
        )
    if (path / "adapter_config.json").is_file() and not any(path.glob("model*.safetensors*")):
        return _open_adapter(path, id_, revision, allow_pickle)
    if (path / "model.safetensors").exists() or any(path.glob("*.safetensors*")):
        return SafetensorsSource(path, id_, revision)
    pickles = sorted(path.glob("pytorch_model*.bin"))
    if pickles:
        return _open_pickle(pickles, path, id_, revision, allow_pickle)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return GgufSource(ggufs[0], id_)
    if ggufs:
        raise BadInput(f"{id_}: got a directory of {len(ggufs)} .gguf files, expected one model; name the file")
    below = f"; {id_}/model has some" if list((path / "model").glob("*.safetensors")) else ""
    raise BadInput(f"{id_}: got a directory without weights, expected *.safetensors (or .gguf) files in it{below}")


def _open_adapter(path: Path, id_: str, revision: str | None, allow_pickle: bool) -> Source:
    files = [path / "adapter_model.safetensors", path / "adapter_model.bin"]
    file = next((f for f in files if f.exists()), None)
    if file is None:
        raise BadInput(f"{id_}: got an adapter_config.json without weights, expected {files[0].name} beside it")
    source = AdapterSource(path, _open_path(file, file, allow_pickle), id_)
    source.revision = revision
    return source


def _open_pickle(files: list[Path], path: Path, id_: str, revision: str | None, allow_pickle: bool) -> Source:
    if not allow_pickle:
        raise BadInput(
            f"{files[0].name}: got pickled weights, expected safetensors: unpickling can run foreign code; "
            "convert them, or pass --allow-pickle (allow_pickle=True) if you trust their origin"
        )
    from htsr.model.memory import PickleSource

    return PickleSource(files, path, id_, revision)

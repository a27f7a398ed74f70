"""Models that are in memory already: a module, a state dict, or pickled weights that the user trusts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from htsr.errors import BadInput
from htsr.model.locate import inside, read_config
from htsr.model.parts import flat_shape
from htsr.model.source import Source, TensorInfo, without_tied

PIECE_ELEMENTS = 1 << 20


class ModuleSource(Source):
    """An nn.Module (its state dict, so that names and hashes are those of a saved model) or a state dict."""

    def __init__(self, model: nn.Module | Mapping[str, Tensor], id_: str | None = None) -> None:
        if not isinstance(model, nn.Module | Mapping):
            raise BadInput(f"got a {type(model).__name__}, expected a path, an id, an nn.Module or a state dict")
        self.module = model if isinstance(model, nn.Module) else None
        state = model.state_dict() if isinstance(model, nn.Module) else model
        self._tensors = distinct_tensors(state)
        self.id = id_ or _name(self.module)
        infos = [
            TensorInfo(name=n, shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."))
            for n, t in self._tensors.items()
        ]
        self.tensors = without_tied(infos, self.config)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        config = getattr(self.module, "config", None)
        return config.to_dict() if config is not None and hasattr(config, "to_dict") else None

    def window(self, name: str, rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
        part = self.in_memory(name)[rows[0] : rows[1], cols[0] : cols[1]].cpu()
        return np.ascontiguousarray((part.float() if part.dtype == torch.bfloat16 else part).numpy())

    def in_memory(self, name: str) -> Tensor:
        tensor = self._tensors[name].detach()
        return tensor.reshape(flat_shape(tuple(tensor.shape)))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._tensors[self.info(name).name].detach()
        return tensor[start:stop] if tensor.ndim else tensor

    def raw(self, name: str) -> Iterator[memoryview]:
        flat = self._tensors[name].detach().contiguous().flatten()
        for start in range(0, flat.numel(), PIECE_ELEMENTS):
            piece: Any = flat[start : start + PIECE_ELEMENTS].cpu().view(torch.uint8).numpy()
            yield memoryview(piece)


class PickleSource(ModuleSource):
    """PyTorch .bin files, unpickled with `weights_only`: tensors and plain containers, no code."""

    def __init__(self, files: list[Path], path: Path, id_: str, revision: str | None = None) -> None:
        self.path, self.revision = path, revision
        root = path if path.is_dir() else path.parent
        state: dict[str, Tensor] = {}
        for file in files:
            part = load_pickle(inside(root, file))
            if twice := state.keys() & part.keys():
                raise BadInput(
                    f"{file.name}: got the tensor {min(twice)!r}, which another file has too, expected each once"
                )
            state.update(part)
        super().__init__(state, id_)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        assert self.path is not None
        return read_config(self.path)


def load_pickle(file: Path) -> dict[str, Tensor]:
    """The state dict in a PyTorch file. `weights_only` admits tensors in plain containers and no code."""
    import pickle

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        got = f"got a pickle that is not a plain state dict ({type(error).__name__})"
        raise BadInput(f"{file.name}: {got}, expected tensors and nothing that runs code") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise BadInput(f"{file.name}: got a {type(content).__name__}, expected a state dict of tensors")
    return dict(content)


def distinct_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict without second names: of those that share memory, shape and strides, the first.

    Args:
        state: name -> tensor.

    Raises:
        BadInput: a value is no tensor or has no data (the meta device), or there is none.
    """
    seen: set[tuple[Any, ...]] = set()
    distinct: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise BadInput(f"got a {type(tensor).__name__} under {name!r}, expected a module or a dict of tensors")
        if tensor.is_meta:
            raise BadInput(f"got {name!r} on the meta device, expected a model with weights; load them first")
        key = (str(tensor.device), tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        distinct[name] = tensor
    if not distinct:
        raise BadInput("got a model without tensors, expected weights")
    return distinct


def _name(module: nn.Module | None) -> str:
    if module is None:
        return "state-dict"
    named = getattr(getattr(module, "config", None), "_name_or_path", "")
    return Path(named).name if named and Path(named).is_absolute() else (named or type(module).__name__)

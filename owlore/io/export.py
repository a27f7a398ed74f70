"""The finished model as a directory that plain transformers loads, in the checkpoint's own dtypes."""

from __future__ import annotations

import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htsr.console import quiet_libraries
from owlore.injection import CONFIG_FILE, InjectedAdapter
from owlore.kernels.rounding import stochastic_round
from owlore.kernels.seeds import generator_for
from owlore.models.loading import Loaded


def export(
    loaded: Loaded,
    directory: Path,
    *,
    trained: Collection[str],
    seed: int | None,
    values: Callable[[Iterable[str]], Mapping[str, Tensor]] | None = None,
) -> None:
    """Write weights, configuration, generation settings and tokenizer.

    values: gives the parameters' exact values by name, where the model itself does not hold them.

    A tensor that was never trained leaves with the bits it came with; where it was loaded in another dtype it is read
    from the checkpoint again. A trained one that is held wider than the checkpoint is rounded stochastically, without
    a seed to nearest.
    """
    model = loaded.model
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    held: dict[str, Tensor] = model.state_dict()
    if values is not None:
        held |= values(name for name in held if name in parameters)
    for name, tensor in held.items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            dtype = loaded.stored.get(name, loaded.stored_default)
            if name in loaded.stored and name in parameters and name not in trained and tensor.dtype != dtype:
                exact = loaded.source.read(name)
            else:
                exact = in_dtype(tensor, dtype, name in trained, seed, name)
            seen[tensor.data_ptr()] = exact
        tensors[name] = seen[tensor.data_ptr()]
    with quiet_libraries(), config_dtype(model, loaded.stored_default):
        model.save_pretrained(directory, state_dict=tensors)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(directory)
    _readable(directory, "config.json")


def export_adapter(loaded: Loaded, injected: InjectedAdapter, directory: Path) -> None:
    """Write the adapter, and the tokenizer that its data were made with; the base is named and not copied."""
    injected.save(directory, base=loaded.reference)
    if loaded.tokenizer is not None:
        with quiet_libraries():
            loaded.tokenizer.save_pretrained(directory)
    _readable(directory, CONFIG_FILE)


def _readable(directory: Path, like: str) -> None:
    """Weights are readable by whom the other files are: safetensors writes them for their owner alone."""
    mode = stat.S_IMODE((directory / like).stat().st_mode)
    for file in directory.glob("*.safetensors"):
        file.chmod(mode)


def in_dtype(tensor: Tensor, dtype: torch.dtype, rounds: bool, seed: int | None, name: str) -> Tensor:
    """The tensor in the checkpoint's dtype; with a seed a trained one of fp32 is rounded stochastically to 16 bits."""
    tensor = tensor.detach()
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    if rounds and seed is not None and tensor.dtype == torch.float32 and dtype.itemsize == 2:
        return stochastic_round(tensor, dtype, generator_for(seed, "export", name, device=tensor.device))
    return tensor.to(dtype)


class config_dtype:  # noqa: N801 - used as a context manager
    """The exported config.json names the dtype of the export, not the one that was trained in."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.config, self.dtype, self.before = model.config, dtype, model.config.dtype

    def __enter__(self) -> None:
        self.config.dtype = self.dtype

    def __exit__(self, *exception: object) -> None:
        self.config.dtype = self.before

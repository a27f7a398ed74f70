"""Writing the finished model to a directory that transformers loads, in the dtypes of the checkpoint it came from."""

from __future__ import annotations

import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
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

    A tensor that was never trained has the bits of the checkpoint; if it was loaded in another dtype, it is read from
    the checkpoint again. A trained tensor with a wider dtype than the checkpoint is rounded.

    Args:
        loaded: The model, its tokenizer and its checkpoint.
        directory: Where to write.
        trained: Names of the trained parameters.
        seed: Seed of stochastic rounding; None rounds to nearest.
        values: Gives the exact values of parameters by name, if the model does not hold them.
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
    """Write the adapter with the name of its base model, and the tokenizer."""
    injected.save(directory, base=loaded.reference)
    if loaded.tokenizer is not None:
        with quiet_libraries():
            loaded.tokenizer.save_pretrained(directory)
    _readable(directory, CONFIG_FILE)


def _readable(directory: Path, like: str) -> None:
    """Give the weights the permissions of the file `like`: safetensors makes them readable by their owner only."""
    mode = stat.S_IMODE((directory / like).stat().st_mode)
    for file in directory.glob("*.safetensors"):
        file.chmod(mode)


def in_dtype(tensor: Tensor, dtype: torch.dtype, rounds: bool, seed: int | None, name: str) -> Tensor:
    """A tensor in another dtype.

    Args:
        tensor: The tensor; one that is not floating point is returned as it is.
        dtype: The dtype to convert to.
        rounds: Whether fp32 is rounded stochastically to 16 bits; otherwise and without a seed it is to nearest.
        seed: Seed of the stochastic rounding, or None.
        name: Name of the tensor, on which the random bits depend.
    """
    tensor = tensor.detach()
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    if rounds and seed is not None and tensor.dtype == torch.float32 and dtype.itemsize == 2:
        return stochastic_round(tensor, dtype, generator_for(seed, "export", name, device=tensor.device))
    return tensor.to(dtype)


@contextmanager
def config_dtype(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Set the dtype in the model's configuration to that of the export instead of that of the training."""
    config, before = model.config, model.config.dtype
    config.dtype = dtype
    try:
        yield
    finally:
        config.dtype = before

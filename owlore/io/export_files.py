"""Export of a model whose blocks were left in their files: every file is written again, one tensor at a time.

Tensors that were not trained are copied byte by byte. The index, if there is one, is copied, since no tensor changes
its name, shape, dtype or file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from torch import Tensor

from htsr.console import quiet_libraries
from htsr.model.safetensors_files import SafetensorsSource
from owlore.io.export import config_dtype, in_dtype
from owlore.io.safetensors_writer import Outline, pieces, write_tensors
from owlore.models.loading import DTYPES, Loaded
from owlore.models.meta_loading import candidates, copies_of

INDEX = "model.safetensors.index.json"


def export_files(
    loaded: Loaded, directory: Path, *, trained: Collection[str], seed: int | None, value: Callable[[str], Tensor]
) -> None:
    """Write weights, configuration, generation settings and tokenizer.

    Args:
        loaded: The model, its tokenizer and its checkpoint in safetensors files.
        directory: Where to write.
        trained: Names of the trained parameters.
        seed: Seed of stochastic rounding; None rounds to nearest.
        value: Gives the exact value of a trained parameter by name.
    """
    source = loaded.source
    assert isinstance(source, SafetensorsSource) and source.path is not None
    directory.mkdir(parents=True, exist_ok=True)
    changed = _changed(loaded, trained)

    dtypes = {entry.info.name: entry.info.dtype for entries in source.files.values() for entry in entries}

    def give(tensor: str) -> Iterator[memoryview]:
        name = changed.get(tensor)
        if name is None:
            yield from source.raw(tensor)
        else:
            yield from pieces(in_dtype(value(name), DTYPES[dtypes[tensor]], True, seed, name))

    for file, entries in source.files.items():
        outlines = {e.info.name: Outline(dtype=e.info.dtype, shape=e.info.shape) for e in entries}
        write_tensors(directory / file, outlines, give, {"format": "pt"})
    if INDEX not in source.files and len(source.files) > 1:
        shutil.copyfile(source.path / INDEX, directory / INDEX)
    _describe(loaded, directory)


def _changed(loaded: Loaded, trained: Collection[str]) -> dict[str, str]:
    """The trained parameter of each tensor in the files that changes, stored copies of tied weights included."""
    assert isinstance(loaded.source, SafetensorsSource)
    found = {loaded.origins[name]: name for name in trained}
    canonical = {id(parameter): name for name, parameter in loaded.model.named_parameters()}
    copies = copies_of(loaded.source)
    for alias, parameter in loaded.model.named_parameters(remove_duplicate=False):
        name = canonical[id(parameter)]
        for tensor in candidates(loaded.model, alias):
            if name in trained and tensor in copies:
                found[tensor] = name
    return found


def _describe(loaded: Loaded, directory: Path) -> None:
    """Write everything but the weights, as `save_pretrained` does."""
    model = loaded.model
    with quiet_libraries(), config_dtype(model, loaded.stored_default):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(directory)

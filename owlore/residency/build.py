"""Fills a residency, one block after another, from a model in memory or from its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from owlore.residency.exact_weights import FileExactWeights, LazyWeights, Overlay, Read, Sources
from owlore.residency.residency import Residency

StoredName = Callable[[str], str | None]  # a parameter's name -> its name in the checkpoint, None where it has none


def fill_from_modules(residency: Residency, *, stored_name: StoredName, read: Read, overlay: Overlay) -> int:
    """Move every block's weights out of its module and into the store.

    With a lossy format the exact weights stay where they were read from. A block that the checkpoint does not hold bit
    for bit (other names, dequantised, changed in memory) goes to the overlay.

    Args:
        residency: its modules hold their weights.
        stored_name: finds a parameter in the checkpoint.
        read: reads a tensor of the checkpoint.
        overlay: where exact weights go that the checkpoint does not hold.

    Returns:
        The number of blocks that went to the overlay.
    """
    sources: list[Sources] = []
    num_kept = 0
    for block, binding in enumerate(residency.bindings):
        exact = {name: parameter.data for name, parameter in binding.parameters.items()}
        found: Sources | None = {}
        if not residency.store.exact:
            found = _sources(exact, {local: stored_name(name) for name, local in binding.local_names.items()}, read)
            if found is None:
                overlay.put(block, exact)
                num_kept += 1
        sources.append(found or {})
        residency.store_block(block, exact)
    if not residency.store.exact:
        residency.exact_weights = FileExactWeights(read, sources, overlay)
    return num_kept


def fill_from_checkpoint(residency: Residency, *, origins: Mapping[str, str], read: Read, overlay: Overlay) -> None:
    """Fill the store from a checkpoint, a tensor at a time, for modules that hold no weights.

    Args:
        residency: its modules lie on the meta device.
        origins: a parameter's name -> its name in the checkpoint, where the exact weights of a lossy format stay.
        read: reads a tensor of the checkpoint.
        overlay: will have the exact weights of trained blocks.
    """
    sources: list[Sources] = []
    for block, binding in enumerate(residency.bindings):
        parameters = binding.parameters
        found = {local: (origins[name], parameters[local].dtype) for name, local in binding.local_names.items()}
        sources.append(found)
        residency.store_block(block, LazyWeights(found, read))
    if not residency.store.exact:
        residency.exact_weights = FileExactWeights(read, sources, overlay)


def _sources(exact: dict[str, Tensor], stored_names: dict[str, str | None], read: Read) -> Sources | None:
    """Where each tensor is in the checkpoint; None where one is not there with these very bits."""
    sources: dict[str, tuple[str, torch.dtype]] = {}
    for name, tensor in exact.items():
        stored = stored_names[name]
        if stored is None or not torch.equal(read(stored).to(tensor.dtype), tensor.cpu()):
            return None
        sources[name] = (stored, tensor.dtype)
    return sources

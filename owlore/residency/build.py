"""From a model in memory or in files to streamed blocks: layouts, store, exact weights, one block after another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from owlore.patches import PatchStack
from owlore.residency.binding import layout_of
from owlore.residency.copy_queue import CopyQueue
from owlore.residency.exact_weights import ExactWeights, FileExactWeights, LazyWeights, Overlay, Read
from owlore.residency.formats import Format
from owlore.residency.pinned import Pin
from owlore.residency.residency import Residency, StoreExactWeights
from owlore.residency.store import Store

Find = Callable[[str], str | None]  # a parameter's name -> its name in the checkpoint


def empty_residency(
    modules: Sequence[nn.Module],
    names: Sequence[Sequence[str]],
    *,
    form: Format,
    resident: Collection[int],
    copies: CopyQueue,
    pin: Pin,
    num_buffers: int = 2,
    exact_weights: ExactWeights | None = None,
    patches: PatchStack | None = None,
) -> Residency:
    """Blocks without weights yet: `Residency.occupy` gives each its own.

    exact_weights: None where the store is exact.
    """
    store = Store([layout_of(m, form) for m in modules], device=copies.device, resident=resident, pin=pin)
    return Residency(
        modules,
        names,
        store=store,
        exact_weights=exact_weights or StoreExactWeights(store),
        copies=copies,
        num_buffers=num_buffers,
        patches=patches,
    )


def move_in(residency: Residency, *, find: Find, read: Read, overlay: Overlay) -> int:
    """Take every block's weights out of its module and into the store.

    Of a lossy format the exact weights are left where they were read from; a block that the checkpoint does not hold
    bit for bit (other names, dequantised, changed in memory) goes to the overlay. Returns how many those are.
    """
    places, kept = [], 0
    for block, binding in enumerate(residency.bindings):
        exact = {name: parameter.data for name, parameter in binding.parameters.items()}
        place: dict[str, tuple[str, torch.dtype]] = {}
        if not residency.store.exact:
            found = _places(exact, {local: find(name) for name, local in binding.local.items()}, read)
            if found is None:
                overlay.put(block, exact)
                kept += 1
            place = found or {}
        places.append(place)
        residency.occupy(block, exact)
    if not residency.store.exact:
        residency.exact_weights = FileExactWeights(read, places, overlay)
    return kept


def read_in(residency: Residency, *, origins: Mapping[str, str], read: Read, overlay: Overlay) -> None:
    """Fill the store straight from a checkpoint, a tensor at a time, for modules that hold no weights.

    origins: a parameter's name -> its name in the checkpoint, where the exact weights of a lossy format stay.
    """
    places = []
    for block, binding in enumerate(residency.bindings):
        place = {local: (origins[name], binding.parameters[local].dtype) for name, local in binding.local.items()}
        places.append(place)
        residency.occupy(block, LazyWeights(place, read))
    if not residency.store.exact:
        residency.exact_weights = FileExactWeights(read, places, overlay)


def _places(
    exact: dict[str, Tensor], stored: dict[str, str | None], read: Read
) -> dict[str, tuple[str, torch.dtype]] | None:
    """Where each tensor is in the checkpoint; None where one is not there with these very bits."""
    places = {}
    for name, tensor in exact.items():
        there = stored[name]
        if there is None or not torch.equal(read(there).to(tensor.dtype), tensor.cpu()):
            return None
        places[name] = (there, tensor.dtype)
    return places

"""A model against its base: the differences of its weights, or an adapter's base with the adapter merged into it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.errors import BadInput
from htsr.model.adapter import COPIED, AdapterSource
from htsr.model.parts import flat_shape
from htsr.model.reading import read_slice
from htsr.model.source import Source, TensorInfo
from htsr.numerics.spectrum import plan_slices

if TYPE_CHECKING:
    import torch

    from htsr.model.layers import LayerView


def against(source: Source, base: Source) -> Source:
    """Open a model against its base.

    Args:
        source: a model, or an adapter.
        base: the model that it was made from.

    Returns:
        The differences `source` - `base`, tensor by tensor of the same name. For an adapter, which is a difference
        already, the base with the adapter merged into it.

    Raises:
        BadInput: the two have no tensor in common, or the base is an adapter.
    """
    if isinstance(base, AdapterSource):
        raise BadInput(f"{base.id}: got an adapter as base, expected the model that it was trained on")
    return MergedSource(source, base) if isinstance(source, AdapterSource) else DeltaSource(source, base)


class _OnBase(Source):
    """What a difference and a merged model have in common: values that are computed from two sources."""

    complete = False
    base: Source

    @cached_property
    def _in_base(self) -> set[str]:
        return {t.name for t in self.base.tensors}

    def has_changed(self, name: str) -> bool:
        """Whether a tensor may differ from the base's."""
        return True

    def relative_change(self, view: LayerView) -> float | None:
        if not self.has_changed(view.stored):
            return 0.0
        if view.stored not in self._in_base:
            return None
        moved = total = 0.0
        for block in plan_slices(view.rows, view.cols):
            before = read_slice(self.base, view, block).astype(np.float64)
            after = read_slice(self, view, block)
            moved += float(np.sum((after if self.is_delta else after - before) ** 2))
            total += float(np.sum(before**2))
        return float(np.sqrt(moved / total)) if total else None


class DeltaSource(_OnBase):
    """W - W_base in float64 for the tensors of the same name and shape; the others are there with a note."""

    is_delta = True

    def __init__(self, tuned: Source, base: Source) -> None:
        self.tuned, self.base = tuned, base
        self.id, self.revision = tuned.id, tuned.revision
        known = {t.name: t for t in base.tensors}
        self.tensors = tuple(_difference(t, known.get(t.name)) for t in tuned.tensors)
        if not any(t.dtype.startswith("delta:") for t in self.tensors):
            raise BadInput(
                f"{tuned.id} against {base.id}: got no tensor of the same name and shape in both, expected a model and "
                "the one it was tuned from, in the same format"
            )

    @property
    def config(self) -> dict[str, Any] | None:
        return self.tuned.config

    def window(self, name: str, rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
        after = self.tuned.window(name, rows, cols).astype(np.float64)
        return after - self.base.window(name, rows, cols)

    def raw(self, name: str) -> Iterator[memoryview]:
        yield from self.tuned.raw(name)
        if self.info(name).dtype.startswith("delta:"):
            yield from self.base.raw(name)


def _difference(tensor: TensorInfo, base: TensorInfo | None) -> TensorInfo:
    if base is None:
        return replace(tensor, note=tensor.note or "no tensor of this name in the base")
    if base.shape != tensor.shape:
        return replace(tensor, note=tensor.note or f"of shape {tensor.shape} here and {base.shape} in the base")
    if not (tensor.readable and base.readable):
        return tensor
    return replace(tensor, dtype=f"delta:{tensor.dtype}")


class MergedSource(_OnBase):
    """W_base + s B A for what a LoRA changes (DoRA: its outputs rescaled), and every other tensor of the base."""

    def __init__(self, adapter: AdapterSource, base: Source) -> None:
        self.adapter, self.base = adapter, base
        self.id, self.path = adapter.id, base.path
        self.changed = {self._base_name(name): name for name in adapter.changes if not adapter.why_not(name)}
        self.replaced = {self._base_name(name, new=True): name for name in adapter.replacements if COPIED not in name}
        self._scales: dict[str, np.ndarray] = {}
        infos = [self._info(t) for t in base.tensors]
        infos += [self._info(adapter.info(at)) for at in self.replaced if at not in self._in_base]
        self.tensors = tuple(infos)

    @property
    def config(self) -> dict[str, Any] | None:
        return self.base.config

    def window(self, name: str, rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
        if name in self.replaced:
            return self.adapter.stored.window(self.adapter.replacements[self.replaced[name]], rows, cols)
        if name not in self.changed:
            return self.base.window(name, rows, cols)
        values = self._sum(name, rows, cols)
        if self.adapter.magnitude(self.changed[name]) is None:
            return values
        along, taken = (0, cols) if self._outputs_across(name) else (1, rows)
        return values * np.expand_dims(self._dora_scale(name)[taken[0] : taken[1]], along)

    def has_changed(self, name: str) -> bool:
        return name in self.changed or name in self.replaced

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self.changed:
            return super().rows(name, start, stop)
        if name in self.replaced:
            return self.adapter.stored.rows(self.adapter.replacements[self.replaced[name]], start, stop)
        return self.base.rows(name, start, stop)

    def raw(self, name: str) -> Iterator[memoryview]:
        if name in self.replaced:
            yield from self.adapter.raw(self.replaced[name])
            return
        yield from self.base.raw(name)
        if name in self.changed:
            yield from self.adapter.raw(self.changed[name])

    def _sum(self, name: str, rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
        return self.base.window(name, rows, cols) + self.adapter.window(self.changed[name], rows, cols)

    def _outputs_across(self, name: str) -> bool:
        return self.adapter.changes[self.changed[name]].transposed

    def _dora_scale(self, name: str) -> np.ndarray:
        """DoRA's factor of every output, shape (out,): its magnitude over the length of its weights in W_base + s B A.

        Reference: Liu et al. 2024 (DoRA), eq. 5.
        """
        if name not in self._scales:
            height, width = flat_shape(self.info(name).shape)
            axis = 0 if self._outputs_across(name) else 1
            squares = np.zeros((height, width)[1 - axis])
            for block in plan_slices(height, width):
                rows, cols = block.window(height, width)
                taken = slice(*(cols if axis == 0 else rows))
                squares[taken] += np.sum(self._sum(name, rows, cols) ** 2, axis=axis)
            magnitude = self.adapter.magnitude(self.changed[name])
            assert magnitude is not None
            self._scales[name] = magnitude / np.sqrt(squares)
        return self._scales[name]

    def _base_name(self, name: str, *, new: bool = False) -> str:
        """The base's name of a weight that the adapter calls `name`; either may have a prefix that the other lacks."""
        ends = [each for each in self._in_base if f".{name}".endswith(f".{each}") or each.endswith(f".{name}")]
        if name in ends:
            return name
        if len(ends) == 1:
            return ends[0]
        if new:
            return name
        raise BadInput(
            f"{self.adapter.id}: got a difference of {name}, expected a tensor of that name in the base {self.base.id}"
        )

    def _info(self, tensor: TensorInfo) -> TensorInfo:
        if tensor.name in self.replaced:
            kept = self.adapter.stored.info(self.adapter.replacements[self.replaced[tensor.name]])
            return replace(kept, name=tensor.name)
        if tensor.name not in self.changed or not tensor.readable:
            return tensor
        change = self.adapter.info(self.changed[tensor.name])
        if change.shape != tensor.shape:
            raise BadInput(
                f"{self.adapter.id}: got a difference of shape {change.shape} for {tensor.name}, expected "
                f"{tensor.shape}, the base's"
            )
        return replace(tensor, dtype=f"merged:{tensor.dtype}")

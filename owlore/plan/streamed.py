"""Bytes that a streamed run holds, from shapes alone.

The walk of `owlore.training.streamed_step` is followed block by block, and the largest moment is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from owlore.blocks import ModelParts
from owlore.kernels.nf4 import CHUNK
from owlore.kernels.projector import projected_shape
from owlore.optim import UpdateSpec
from owlore.residency.binding import layout_of
from owlore.residency.blob_layout import BlobLayout
from owlore.residency.boundaries import MAX_IN_FLIGHT
from owlore.residency.device_buffers import NUM_BUFFERS
from owlore.residency.formats import FORMATS, NF4
from owlore.residency.pinned import locked_bytes
from owlore.residency.placement import Placement


@dataclass(frozen=True, kw_only=True)
class MicroBatchBytes:
    """What a step is made of. boundary, block, frozen, outside, logits: bytes for one micro-batch."""

    accum: int
    boundary: int
    block: int
    frozen_block: int
    outside: int
    logits: int


@dataclass(frozen=True, kw_only=True)
class PeakBytes:
    """Largest bytes by kind over the walk of a step, and the largest sum of them."""

    gradients: int
    activations: int
    logits: int
    peak: int


class StreamedModel:
    """Layouts of a model's blocks under given placement."""

    def __init__(self, parts: ModelParts, placement: Placement) -> None:
        self.parts, self.placement = parts, placement
        self.layouts: list[BlobLayout] = [layout_of(module, FORMATS[placement.frozen]) for module in parts.modules]
        self.resident = set(placement.resident_blocks(parts.num_blocks))
        self.streamed = set(range(parts.num_blocks)) - self.resident
        self.own = [sum(p.numel() * p.element_size() for _, p in block) for block in parts.blocks]

    def device_bytes(self, drawn: Sequence[int]) -> dict[str, int]:
        """Block weights on the device, by kind, as `Residency.device_bytes` counts them."""
        exact = self.layouts[0].exact
        sizes = [self.layouts[block].num_bytes for block in self.streamed]
        stay = self.resident if exact else self.resident - set(drawn)
        return {
            "slots": min(NUM_BUFFERS, len(sizes)) * max(sizes, default=0),
            "resident": sum(self.layouts[block].num_bytes for block in stay),
            "drawn": sum(self.own[block] for block in drawn if not (exact and block in self.resident)),
        }

    def outside_bytes(self, always_on: Sequence[str]) -> tuple[int, int]:
        """(on the device, on the host): parameters outside the blocks."""
        outside = self.parts.parameters((), self.parts.groups)
        total = sum(p.numel() * p.element_size() for p in outside.values())
        head = {name for name, _ in self.parts.groups["head"]}
        access: Any = getattr(self.parts.model, "get_input_embeddings", None)
        table = {id(p) for p in access().parameters()} if access is not None else set()
        inputs = {name: p for name, p in self.parts.groups["embeddings"] if id(p) in table}
        if self.placement.residency != "host" or "embeddings" in always_on or inputs.keys() & head:
            return total, 0
        left = sum(p.numel() * p.element_size() for p in inputs.values())
        return total - left, left

    def host_bytes(self, load: MicroBatchBytes, low: int, embedding: int) -> dict[str, int]:
        """Host memory by kind. overlay: exact bits of all blocks, what it grows to when each has been trained."""
        blobs = [self.layouts[block].num_bytes for block in self.streamed]
        boundaries = (self.parts.num_blocks - low) * load.accum * load.boundary if self.placement.offload else 0
        return {
            "store": sum(blobs),
            "locked": sum(locked_bytes(size) for size in blobs) + boundaries,
            "embedding": embedding,
            "boundaries": boundaries,
            "overlay": 0 if self.layouts[0].exact else sum(self.own),
        }

    def dense_bytes(self, *, together: bool) -> int:
        """What turning the largest lossy matrix into a dense one takes for a moment, or those of a block together."""
        sizes = [(int(np.prod(w.shape)), w) for layout in self.layouts for w in layout.weights if not w.form.exact]
        if not sizes:
            return 0
        count, weight = max(sizes, key=lambda pair: pair[0])
        passing = 10 * min(count, CHUNK) if isinstance(weight.form, NF4) else 0
        if together:
            whole = max(_lossy_bytes(layout) for layout in self.layouts)
            return whole + passing
        return count * weight.dtype.itemsize + passing


def _lossy_bytes(layout: BlobLayout) -> int:
    """Of a block's lossy matrices when they are dense."""
    return sum(int(np.prod(w.shape)) * w.dtype.itemsize for w in layout.weights if not w.form.exact)


def streamed_peak(
    model: StreamedModel,
    load: MicroBatchBytes,
    *,
    drawn: Sequence[int],
    low: int,
    specs: Mapping[str, UpdateSpec],
    parameters: Mapping[str, nn.Parameter],
) -> PeakBytes:
    """The largest moment of a step: at the loss, or in the backward of some block."""
    dense, blocks = model.dense_bytes(together=load.accum > 1), model.parts.num_blocks
    home = model.parts.block_of()
    by_block: dict[int | None, list[tuple[UpdateSpec, nn.Parameter]]] = {}
    for name, parameter in parameters.items():
        by_block.setdefault(home.get(name), []).append((specs[name], parameter))
    ends = _Ends(model.parts, specs, parameters, load.accum)

    def kept(down_to: int) -> int:
        """Boundaries on the device when blocks from `down_to` on are still to be walked back."""
        count = max(0, down_to - low + 1) * load.accum
        return load.boundary * (min(count, MAX_IN_FLIGHT + 1) if model.placement.offload else count)

    passing = load.accum * load.boundary  # hidden states on the way up, their gradients on the way down
    top = kept(blocks - 1) + passing + load.boundary + load.outside
    moments = [(ends.at_loss, top, load.logits), (ends.at_top, top, 0)]
    gathered = ends.after_top
    for block in reversed(range(low, blocks)):
        inside = by_block.get(block, [])
        whole = sum(_arriving(*pair, together=load.accum > 1) for pair in inside)
        single = max((_arriving(*pair, together=False) for pair in inside), default=0)
        gathered += sum(gathered_bytes(*pair) for pair in inside)
        work = load.block if inside else load.frozen_block
        held = kept(block) + passing + load.boundary + work + load.block // 3 + (0 if block in drawn else dense)
        moments.append((gathered + (whole if load.accum > 1 else single), held, 0))
    moments.append((gathered + ends.at_bottom, passing, 0))
    return PeakBytes(
        gradients=max(g for g, _, _ in moments),
        activations=max(a for _, a, _ in moments),
        logits=load.logits,
        peak=max(sum(moment) for moment in moments),
    )


class _Ends:
    """Gradients of what is trained outside the blocks, by the moments at which they come.

    The head's and the last norm's come with each micro-batch's loss, those of the embeddings when the walk is down.
    Where both ends share a weight, every micro-batch's part from the loss waits for the other one (`held`).
    """

    def __init__(
        self, parts: ModelParts, specs: Mapping[str, UpdateSpec], parameters: Mapping[str, nn.Parameter], accum: int
    ) -> None:
        inputs, heads = (
            {name for name, _ in parts.groups[group]} & parameters.keys() for group in ("embeddings", "head")
        )
        outside = parameters.keys() - parts.block_of().keys()
        shared = bool(inputs & heads)
        early, late = (set(), outside) if shared else (outside - inputs, inputs)

        def total(names: Iterable[str], size: Callable[[UpdateSpec, nn.Parameter], int]) -> int:
            return sum(size(specs[name], parameters[name]) for name in names)

        def most(names: Iterable[str], size: Callable[[UpdateSpec, nn.Parameter], int]) -> int:
            return max((size(specs[name], parameters[name]) for name in names), default=0)

        held = total(outside if shared else (), lambda spec, p: p.numel() * p.element_size())
        sums = total(early, _sum) if accum > 1 else 0
        made = total(heads, lambda spec, p: 4 * p.numel())  # the head's, added up in fp32 while the loss is computed
        self.after_top = total(early, gathered_bytes) + accum * held
        earlier = self.after_top - held + sums if accum > 1 else 0
        own = total(heads, lambda spec, p: p.numel() * (p.element_size() % 4))  # a part of it, in the head's own dtype
        self.at_loss = earlier + made + own
        self.at_top = (earlier if shared else self.after_top + sums) + max(most(early, _single), made + held)
        # Of a shared weight the part from the bottom, that from the top (it is held) and their sum are there together.
        twice = most(late, lambda spec, p: p.numel() * p.element_size()) if shared else 0
        late_sums = total(late, _sum) if accum > 1 else 0
        self.at_bottom = total(late, gathered_bytes) + late_sums + most(late, _single) + twice


def _sum(spec: UpdateSpec, parameter: nn.Parameter) -> int:
    return _arriving(spec, parameter, together=True)


def _single(spec: UpdateSpec, parameter: nn.Parameter) -> int:
    return _arriving(spec, parameter, together=False)


def gathered_bytes(spec: UpdateSpec, parameter: nn.Parameter) -> int:
    """A parameter's gradient as it waits for the update: fp32, projected where the spec projects, and beside it whole
    where the update is of full rank."""
    count = parameter.numel()
    if spec.projects(parameter.shape):
        rows, cols = parameter.shape
        count = int(np.prod(projected_shape(rows, cols, int(spec.rank or 0), spec.larger))) + (
            count if spec.full_rank else 0
        )
    return 4 * count


def _arriving(spec: UpdateSpec, parameter: nn.Parameter, *, together: bool) -> int:
    """A gradient as autograd makes it and its fp32 copy; with `together` the sum that waits for the last micro-batch.

    A block sees all its micro-batches in one visit, so only its own sums wait.
    """
    count = parameter.numel()
    if together:
        return 4 * count if spec.projects(parameter.shape) else 0
    return count * (parameter.element_size() + (0 if parameter.element_size() == 4 else 4))

"""Bytes that a streamed run holds, from shapes alone.

The walk of `owlore.training.streamed_step` is followed block by block, and the largest sum of bytes is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from owlore.blocks import ModelParts
from owlore.kernels.nf4 import CHUNK
from owlore.optim import UpdateSpec
from owlore.plan.model_spec import ModelSpec
from owlore.plan.step_bytes import PeakBytes, accumulated_bytes, arriving_bytes, full_sum_bytes, logits_bytes
from owlore.residency.binding import layout_of
from owlore.residency.blob_layout import BlobLayout
from owlore.residency.boundaries import MAX_IN_FLIGHT
from owlore.residency.device_buffers import NUM_BUFFERS
from owlore.residency.formats import FORMATS, NF4
from owlore.residency.pinned import locked_bytes
from owlore.residency.placement import Placement


@dataclass(frozen=True, kw_only=True)
class MicroBatchBytes:
    """Bytes of activations of one micro-batch, and how many of them a step has.

    Attributes:
        accum: micro-batches of a step.
        boundary: hidden state between two blocks.
        block: what autograd saves for a trained block.
        frozen_block: what autograd saves for a frozen block that a gradient passes through.
        outside: what autograd saves for the final norm and the head.
        logits: a chunk of logits and the hidden states that the head is given.
    """

    accum: int
    boundary: int
    block: int
    frozen_block: int
    outside: int
    logits: int


def micro_batch_bytes(model_spec: ModelSpec, *, batch: int, accum: int, tokens: int) -> MicroBatchBytes:
    """Bytes of `accum` micro-batches a step, each of `batch` sequences of `tokens` tokens."""
    footprint = model_spec.footprint
    return MicroBatchBytes(
        accum=accum,
        boundary=int(batch * footprint.boundary(tokens)),
        block=int(batch * footprint.trained(tokens)),
        frozen_block=int(batch * footprint.frozen(tokens)),
        outside=int(batch * footprint.outside(tokens)),
        logits=logits_bytes(model_spec, batch * tokens),
    )


class StreamedModel:
    """Layouts of a model's blocks under a placement.

    Args:
        parts: the model's parts, which may be on the meta device.
        placement: where frozen blocks are kept and in which format.
    """

    def __init__(self, parts: ModelParts, placement: Placement) -> None:
        self.parts, self.placement = parts, placement
        self.layouts: list[BlobLayout] = [layout_of(module, FORMATS[placement.frozen]) for module in parts.modules]
        self.resident = set(placement.resident_blocks(parts.num_blocks))
        self.streamed = set(range(parts.num_blocks)) - self.resident
        self.block_bytes = [sum(p.nbytes for _, p in block) for block in parts.blocks]

    def device_bytes(self, drawn: Sequence[int]) -> dict[str, int]:
        """Block weights on the device, by kind, as `Residency.device_bytes` counts them.

        Args:
            drawn: indexes of the trained blocks.
        """
        exact = self.layouts[0].exact
        sizes = [self.layouts[block].num_bytes for block in self.streamed]
        stay = self.resident if exact else self.resident - set(drawn)
        return {
            "slots": min(NUM_BUFFERS, len(sizes)) * max(sizes, default=0),
            "resident": sum(self.layouts[block].num_bytes for block in stay),
            "drawn": sum(self.block_bytes[block] for block in drawn if not (exact and block in self.resident)),
        }

    def outside_bytes(self, always_on: Sequence[str]) -> tuple[int, int]:
        """Bytes of the parameters outside the blocks: (on the device, on the host).

        Args:
            always_on: groups of `owlore.choices.GROUPS` that are trained in every period.
        """
        outside = self.parts.parameters((), self.parts.groups)
        total = sum(p.nbytes for p in outside.values())
        head = {name for name, _ in self.parts.groups["head"]}
        access: Any = getattr(self.parts.model, "get_input_embeddings", None)
        table = {id(p) for p in access().parameters()} if access is not None else set()
        inputs = {name: p for name, p in self.parts.groups["embeddings"] if id(p) in table}
        if self.placement.residency != "host" or "embeddings" in always_on or inputs.keys() & head:
            return total, 0
        on_host = sum(p.nbytes for p in inputs.values())
        return total - on_host, on_host

    def host_bytes(self, micro_batch: MicroBatchBytes, lowest: int, embedding: int) -> dict[str, int]:
        """Host memory by kind.

        Args:
            micro_batch: bytes of a micro-batch.
            lowest: index of the lowest block that backward reaches.
            embedding: bytes of an embedding table that stays on the host.

        Returns:
            Bytes by kind; `overlay` is what the exact bits of trained blocks take when each block has been trained.
        """
        blobs = [self.layouts[block].num_bytes for block in self.streamed]
        boundaries = 0
        if self.placement.offload:
            boundaries = (self.parts.num_blocks - lowest) * micro_batch.accum * micro_batch.boundary
        return {
            "store": sum(blobs),
            "locked": sum(locked_bytes(size) for size in blobs) + boundaries,
            "embedding": embedding,
            "boundaries": boundaries,
            "overlay": 0 if self.layouts[0].exact else sum(self.block_bytes),
        }

    def dense_bytes(self, *, together: bool) -> int:
        """Bytes that dequantising a block takes in backward.

        Args:
            together: whether all matrices of the block are dense at once, instead of the largest one.
        """
        sizes = [(int(np.prod(w.shape)), w) for layout in self.layouts for w in layout.weights if not w.form.exact]
        if not sizes:
            return 0
        count, weight = max(sizes, key=lambda pair: pair[0])
        workspace = 10 * min(count, CHUNK) if isinstance(weight.form, NF4) else 0
        dense = max(map(_dense_block_bytes, self.layouts)) if together else count * weight.dtype.itemsize
        return dense + workspace


def _dense_block_bytes(layout: BlobLayout) -> int:
    """Bytes of a block's quantised matrices when they are dense."""
    return sum(int(np.prod(w.shape)) * w.dtype.itemsize for w in layout.weights if not w.form.exact)


def streamed_peak(
    model: StreamedModel,
    micro_batch: MicroBatchBytes,
    *,
    drawn: Sequence[int],
    lowest: int,
    specs: Mapping[str, UpdateSpec],
    parameters: Mapping[str, nn.Parameter],
) -> PeakBytes:
    """Bytes of a step: at the loss, and in the backward of each block.

    Args:
        model: layouts of the blocks.
        micro_batch: bytes of a micro-batch.
        drawn: indexes of the trained blocks.
        lowest: index of the lowest block that backward reaches.
        specs: how each trained parameter is updated.
        parameters: trained parameters by name.
    """
    several, blocks, block_of = micro_batch.accum > 1, model.parts.num_blocks, model.parts.block_of()
    dense = model.dense_bytes(together=several)
    by_block: dict[int | None, list[tuple[UpdateSpec, nn.Parameter]]] = {}
    for name, parameter in parameters.items():
        by_block.setdefault(block_of.get(name), []).append((specs[name], parameter))
    outside = _OutsideGradients(model.parts, specs, parameters, micro_batch.accum)

    def kept(down_to: int) -> int:
        """Boundaries on the device when blocks from `down_to` on are still to be walked back."""
        count = max(0, down_to - lowest + 1) * micro_batch.accum
        return micro_batch.boundary * (min(count, MAX_IN_FLIGHT + 1) if model.placement.offload else count)

    hidden = micro_batch.accum * micro_batch.boundary  # hidden states in forward, their gradients in backward
    top = kept(blocks - 1) + hidden + micro_batch.boundary + micro_batch.outside
    moments = [(outside.at_loss, top, micro_batch.logits), (outside.at_top, top, 0)]
    accumulated = outside.after_top
    for block in reversed(range(lowest, blocks)):
        inside = by_block.get(block, [])
        # A block sees all its micro-batches in one visit, so that only its own sums of full gradients wait.
        if several:
            arriving = sum(full_sum_bytes(*pair) for pair in inside)
        else:
            arriving = max((arriving_bytes(parameter) for _, parameter in inside), default=0)
        accumulated += sum(accumulated_bytes(*pair) for pair in inside)
        work = micro_batch.block if inside else micro_batch.frozen_block
        held = kept(block) + hidden + micro_batch.boundary + work + micro_batch.block // 3
        moments.append((accumulated + arriving, held + (0 if block in drawn else dense), 0))
    moments.append((accumulated + outside.at_bottom, hidden, 0))
    return PeakBytes(
        gradients=max(gradients for gradients, _, _ in moments),
        activations=max(activations for _, activations, _ in moments),
        logits=micro_batch.logits,
        peak=max(sum(moment) for moment in moments),
    )


class _OutsideGradients:
    """Bytes of the gradients of parameters outside the blocks, by the moments of a step at which they come.

    Those of the head and the last norm come with each micro-batch's loss, those of the embeddings at the end of
    backward. Where head and embeddings share a weight, every micro-batch's part from the loss waits for the other one.

    Attributes:
        at_loss: while the loss is computed.
        at_top: when the backward of the loss ends.
        after_top: what is accumulated from then on.
        at_bottom: beside what is accumulated, when the backward of the embeddings ends.
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

        def largest(names: Iterable[str]) -> int:
            return max((arriving_bytes(parameters[name]) for name in names), default=0)

        waiting = total(outside, lambda _, p: p.nbytes) if shared else 0
        early_sums = total(early, full_sum_bytes) if accum > 1 else 0
        # The head's gradient is summed in fp32 while the loss is computed; a part of it exists in the head's own dtype.
        made = total(heads, lambda _, p: 4 * p.numel())
        part = total(heads, lambda _, p: p.numel() * (p.element_size() % 4))
        self.after_top = total(early, accumulated_bytes) + accum * waiting
        earlier = self.after_top - waiting + early_sums if accum > 1 else 0
        self.at_loss = earlier + made + part
        self.at_top = (earlier if shared else self.after_top + early_sums) + max(largest(early), made + waiting)
        # Of a shared weight the part from the bottom, that from the top (it waits) and their sum exist together.
        twice = max((parameters[name].nbytes for name in late), default=0)
        late_sums = total(late, full_sum_bytes) if accum > 1 else 0
        self.at_bottom = total(late, accumulated_bytes) + late_sums + largest(late) + (twice if shared else 0)

"""Bytes that come and go within a step whose blocks are all on the device; `streaming_plan` has the other kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from owlore.blocks import ModelParts
from owlore.kernels.cross_entropy import chunk_rows
from owlore.optim import UpdateSpec
from owlore.plan.model_spec import ModelSpec
from owlore.plan.streamed import gathered_bytes


@dataclass(frozen=True, kw_only=True)
class ResidentPeak:
    """Bytes that come and go within a step, and the larger of the two moments that can be the peak."""

    gradients: int
    arriving: int
    activations: int
    block: int
    logits: int
    head: int  # gradient of a trained head: made with the loss, before any activation goes
    recompute: bool
    accumulates: bool

    @property
    def in_backward(self) -> int:
        """Beyond what was kept: gradients of a block's activations, about a third of what it saves; and, when
        activations are recomputed, one block's own."""
        return self.block // 3 + (self.block if self.recompute else 0)

    @property
    def peak(self) -> int:
        """At the loss all activations and a chunk of logits are held. In backward, activations go as gradients come:
        the larger of the two counts. What earlier micro-batches gathered stands through all of a later one."""
        if self.accumulates:
            return self.gradients + self.activations + max(self.logits, self.in_backward)
        kept = max(self.activations + (0 if self.recompute else self.arriving), self.gradients)
        return max(self.activations + self.logits + self.head, kept + self.in_backward)


def resident_peak(
    shape: ModelSpec,
    parameters: Mapping[str, nn.Parameter],
    specs: Mapping[str, UpdateSpec],
    *,
    low: int,
    drawn: int,
    batch: int,
    tokens: int,
    accumulates: bool,
    together: int,
    recompute: bool,
) -> ResidentPeak:
    """Those of a step that trains `parameters` in `drawn` blocks, the lowest of them `low`.

    together: micro-batches, of all processes, that a new basis has to see; above one it waits for their sum.
    """
    trained = shape.footprint.trained
    return ResidentPeak(
        gradients=gradient_bytes(parameters, specs, together),
        arriving=arriving_bytes(parameters, specs),
        activations=_activations(shape, low, drawn, batch, tokens, recompute),
        block=int(batch * trained(tokens) + trained.fixed),
        logits=logits_bytes(shape, batch * tokens),
        head=_head_gradient(shape.parts, parameters),
        recompute=recompute,
        accumulates=accumulates,
    )


def gradient_bytes(parameters: Mapping[str, nn.Parameter], specs: Mapping[str, UpdateSpec], accum: int) -> int:
    """Most bytes of gradients at once: what is gathered, and the one matrix that is arriving.

    A step that looks for new bases with accumulation gathers those matrices' sums whole; so does every step of an
    update of full rank, beside the projected one.
    """
    gathered = 0
    for name, parameter in parameters.items():
        spec = specs[name]
        together = accum > 1 and not spec.full_rank
        gathered += 4 * parameter.numel() if together else gathered_bytes(spec, parameter)
    return gathered + arriving_bytes(parameters, specs)


def arriving_bytes(parameters: Mapping[str, nn.Parameter], specs: Mapping[str, UpdateSpec]) -> int:
    """The largest gradient that exists for the moment of its hook: as autograd made it, and in fp32."""
    sizes = [
        p.numel() * (p.element_size() + (0 if p.dtype == torch.float32 else 4))
        for name, p in parameters.items()
        if specs[name].projects(p.shape) or p.dtype != torch.float32
    ]
    return max(sizes, default=0)


def _activations(shape: ModelSpec, low: int, active: int, batch: int, tokens: int, recompute: bool) -> int:
    """Saved for backward when the forward is done."""
    footprint, blocks = shape.footprint, shape.parts.num_blocks - low
    if recompute:
        kept, fixed = blocks * footprint.boundary(tokens), 0.0
    else:
        kept = active * footprint.trained(tokens) + max(0, blocks - active) * footprint.frozen(tokens)
        fixed = active * footprint.trained.fixed + max(0, blocks - active) * footprint.frozen.fixed
    return int(batch * (kept + footprint.outside(tokens)) + fixed)


def logits_bytes(shape: ModelSpec, tokens: int) -> int:
    """One chunk of logits in fp32 (and, for a moment, in 16 bits), and the hidden states that are given to the head
    with their gradient."""
    size = torch.empty((), dtype=shape.dtype).element_size()
    rows = min(chunk_rows(shape.vocabulary), tokens)
    return rows * shape.vocabulary * (4 if size == 4 else 4 + size) + 2 * tokens * shape.hidden * size


def _head_gradient(parts: ModelParts, trained: Mapping[str, nn.Parameter]) -> int:
    """Bytes of the head's gradient while the loss is computed, summed in fp32; in 16 bits a chunk's part beside it."""
    sizes = [p.numel() * (4 if p.element_size() == 4 else 4 + p.element_size())
             for name, p in parts.groups["head"] if name in trained]  # fmt: skip
    return sum(sizes)

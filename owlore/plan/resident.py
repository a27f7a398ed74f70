"""Bytes that come and go within a step whose blocks are all on the device; `streamed` has the other kind."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from owlore.blocks import ModelParts
from owlore.optim import UpdateSpec
from owlore.plan.model_spec import ModelSpec
from owlore.plan.step_bytes import PeakBytes, accumulated_bytes, arriving_bytes, logits_bytes


def resident_peak(
    model_spec: ModelSpec,
    parameters: Mapping[str, nn.Parameter],
    specs: Mapping[str, UpdateSpec],
    *,
    lowest: int,
    drawn: int,
    batch: int,
    accum: int,
    tokens: int,
    processes: int,
    recompute: bool,
) -> PeakBytes:
    """Bytes of a step in one of its processes.

    At the loss all activations and a chunk of logits are held. In backward, activations are freed as gradients come, so
    that the larger of the two counts. What earlier micro-batches accumulated is held during all of a later one.

    Args:
        model_spec: the model.
        parameters: trained parameters by name.
        specs: how each of them is updated.
        lowest: index of the lowest block that backward reaches.
        drawn: number of trained blocks.
        batch: sequences of a micro-batch.
        accum: micro-batches of a step in each process.
        tokens: tokens of a sequence.
        processes: processes that train together.
        recompute: whether activations are recomputed in backward.
    """
    several = accum > 1 or processes > 1  # a new basis is found from the sum over all micro-batches of all processes
    trained = model_spec.footprint.trained
    arriving = largest_arriving_bytes(parameters, specs)
    gradients = _accumulated(parameters, specs, several=several) + arriving
    activations = _saved_activations(model_spec, lowest, drawn, batch, tokens, recompute)
    logits = logits_bytes(model_spec, batch * tokens)
    block = int(batch * trained(tokens) + trained.fixed)
    # Gradients of a block's activations, about a third of what it saves; and one recomputed block's own activations.
    in_backward = block // 3 + (block if recompute else 0)
    if accum > 1:
        peak = gradients + activations + max(logits, in_backward)
    else:
        kept = max(activations + (0 if recompute else arriving), gradients)
        at_loss = activations + logits + _head_gradient(model_spec.parts, parameters)
        peak = max(at_loss, kept + in_backward)
    return PeakBytes(gradients=gradients, activations=activations + in_backward, logits=logits, peak=peak)


def _accumulated(parameters: Mapping[str, nn.Parameter], specs: Mapping[str, UpdateSpec], *, several: bool) -> int:
    """Bytes of accumulated gradients.

    A step that finds new bases from several micro-batches holds those matrices' sums of full gradients; so does every
    step of a full-rank update, beside the projected one.
    """
    return sum(
        4 * parameter.numel() if several and not specs[name].full_rank else accumulated_bytes(specs[name], parameter)
        for name, parameter in parameters.items()
    )


def largest_arriving_bytes(parameters: Mapping[str, nn.Parameter], specs: Mapping[str, UpdateSpec]) -> int:
    """The most bytes of a gradient while its hook runs; a dense fp32 gradient is accumulated without a copy."""
    copied = [p for name, p in parameters.items() if specs[name].projects(p.shape) or p.dtype != torch.float32]
    return max(map(arriving_bytes, copied), default=0)


def _saved_activations(model_spec: ModelSpec, lowest: int, drawn: int, batch: int, tokens: int, recompute: bool) -> int:
    """Bytes saved for backward when the forward is done."""
    footprint, blocks = model_spec.footprint, model_spec.parts.num_blocks - lowest
    if recompute:
        kept, fixed = blocks * footprint.boundary(tokens), 0.0
    else:
        kept = drawn * footprint.trained(tokens) + max(0, blocks - drawn) * footprint.frozen(tokens)
        fixed = drawn * footprint.trained.fixed + max(0, blocks - drawn) * footprint.frozen.fixed
    return int(batch * (kept + footprint.outside(tokens)) + fixed)


def _head_gradient(parts: ModelParts, trained: Mapping[str, nn.Parameter]) -> int:
    """Bytes of a trained head's gradient, which is made with the loss, before any activation is freed.

    It is summed in fp32; in 16 bits a chunk's part exists beside it.
    """
    head = [p for name, p in parts.groups["head"] if name in trained]
    return sum(p.numel() * (4 if p.element_size() == 4 else 4 + p.element_size()) for p in head)

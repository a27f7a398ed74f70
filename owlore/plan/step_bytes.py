"""Bytes that come and go within a step, as the plans of resident and of streamed runs count them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from owlore.kernels.cross_entropy import chunk_rows
from owlore.kernels.projector import projected_shape
from owlore.optim import UpdateSpec
from owlore.plan.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class PeakBytes:
    """Largest bytes of a step by kind, and the largest sum of them at one moment.

    Attributes:
        gradients: gradients of trained parameters.
        activations: activations, and the gradients of them that backward makes.
        logits: a chunk of logits, and the hidden states that the head is given.
        peak: largest sum of the three; they do not all peak at one moment.
    """

    gradients: int
    activations: int
    logits: int
    peak: int


def logits_bytes(model_spec: ModelSpec, tokens: int) -> int:
    """Bytes of one chunk of logits in fp32 and of the hidden states that the head is given, with their gradient.

    In a 16-bit model the chunk exists in 16 bits too for a moment.

    Args:
        model_spec: the model.
        tokens: tokens of a micro-batch.
    """
    size = torch.empty((), dtype=model_spec.dtype).element_size()
    rows = min(chunk_rows(model_spec.vocabulary), tokens)
    return rows * model_spec.vocabulary * (4 if size == 4 else 4 + size) + 2 * tokens * model_spec.hidden * size


def accumulated_bytes(spec: UpdateSpec, parameter: nn.Parameter) -> int:
    """Bytes of a parameter's gradient while it waits for the update, in fp32.

    It is projected where the spec projects; a full-rank update needs the full gradient beside the projected one.

    Args:
        spec: how the parameter is updated.
        parameter: the parameter.
    """
    count = parameter.numel()
    if spec.projects(parameter.shape):
        rows, cols = parameter.shape
        projected = int(np.prod(projected_shape(rows, cols, int(spec.rank or 0), spec.larger)))
        count = projected + (count if spec.full_rank else 0)
    return 4 * count


def full_sum_bytes(spec: UpdateSpec, parameter: nn.Parameter) -> int:
    """Bytes of the fp32 sum of full gradients from which a new basis is found; 0 where nothing is projected."""
    return 4 * parameter.numel() if spec.projects(parameter.shape) else 0


def arriving_bytes(parameter: nn.Parameter) -> int:
    """Bytes of a gradient while its hook runs: as autograd made it and, where that is not fp32, its fp32 copy."""
    return parameter.numel() * (parameter.element_size() + (0 if parameter.dtype == torch.float32 else 4))

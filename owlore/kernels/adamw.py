"""The AdamW step on bare tensors.

References: Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2 (decoupled decay).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18  # elements updated at once: the operands, 1 MiB each, stay in a CPU's caches


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Constants of the update.

    Attributes:
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
        decay: Decoupled weight decay per unit of learning rate.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0


def update_moments(gradient: Tensor, mean: Tensor, square: Tensor, constants: AdamW) -> None:
    """m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g^2, in place; all three tensors are fp32 and of one shape."""
    mean.lerp_(gradient, 1 - constants.beta1)
    square.mul_(constants.beta2).addcmul_(gradient, gradient, value=1 - constants.beta2)


def direction(mean: Tensor, square: Tensor, step: int, constants: AdamW) -> Tensor:
    """m_hat / (sqrt(v_hat) + eps) after `step` updates (counted from 1), as a new tensor; m and v do not change."""
    denominator = (square.sqrt() / math.sqrt(1 - constants.beta2**step)).add_(constants.eps)
    return torch.div(mean, denominator, out=denominator).div_(1 - constants.beta1**step)


def adamw_update_(gradient: Tensor, mean: Tensor, square: Tensor, step: int, constants: AdamW) -> Tensor:
    """Update both moments and turn the gradient into the direction, in place and a few rows at a time.

    The result is the same, element by element, as that of `update_moments` and `direction` on the full tensors, but
    no further tensor of the parameter's size is made.

    Args:
        gradient: The gradient, fp32; it is overwritten with the direction.
        mean: First moment, fp32, of the gradient's shape; updated in place.
        square: Second moment, fp32, of the gradient's shape; updated in place.
        step: Number of this update, counted from 1.
        constants: Constants of the update.

    Returns:
        `gradient`, which now holds the direction.
    """
    tensors = (gradient, mean, square)
    limit = CHUNK_ELEMENTS << 6 if gradient.is_cuda else CHUNK_ELEMENTS  # small launches are slow on a GPU
    if gradient.numel() <= limit:
        parts = [tensors]
    else:
        rows = max(1, limit * len(gradient) // gradient.numel())
        parts = list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
    for g, m, v in parts:
        update_moments(g, m, v, constants)
        g.copy_(direction(m, v, step, constants))
    return gradient

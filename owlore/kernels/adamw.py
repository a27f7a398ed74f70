"""The AdamW step on bare tensors.

References: Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2 (decoupled decay).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18  # of a parameter at once: the operands, 1 MiB each, stay in a CPU's caches


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Constants of the update; `decay` is per unit of learning rate."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0


def update_moments(gradient: Tensor, mean: Tensor, square: Tensor, constants: AdamW) -> None:
    """m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g^2, in place; all three fp32 and of one shape."""
    mean.lerp_(gradient, 1 - constants.beta1)
    square.mul_(constants.beta2).addcmul_(gradient, gradient, value=1 - constants.beta2)


def direction(mean: Tensor, square: Tensor, step: int, constants: AdamW) -> Tensor:
    """m_hat / (sqrt(v_hat) + eps) after `step` updates (counted from 1); a new tensor, m and v untouched."""
    denominator = (square.sqrt() / math.sqrt(1 - constants.beta2**step)).add_(constants.eps)
    return torch.div(mean, denominator, out=denominator).div_(1 - constants.beta1**step)


def adamw_update_(gradient: Tensor, mean: Tensor, square: Tensor, step: int, constants: AdamW) -> Tensor:
    """Both of the above on a few rows at a time, in place: `gradient` becomes the direction and is returned.

    Element by element the same as on the whole; no tensor of the parameter's size is made beside the three.
    """
    whole = (gradient, mean, square)
    most = CHUNK_ELEMENTS << 6 if gradient.is_cuda else CHUNK_ELEMENTS  # a launch of a GPU has to be worth it
    if gradient.numel() <= most:
        parts = [whole]
    else:
        rows = max(1, most * len(gradient) // gradient.numel())
        parts = list(zip(*(tensor.split(rows) for tensor in whole), strict=True))
    for g, m, v in parts:
        update_moments(g, m, v, constants)
        g.copy_(direction(m, v, step, constants))
    return gradient

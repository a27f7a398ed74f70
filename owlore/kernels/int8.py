"""Weights in eight bits with one scale a row: W[i, j] = codes[i, j] * scale[i], scale[i] = max |W[i, :]| / 127.

Reference: Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339), section 2.1, row-wise absmax quantisation of the
weights; here without the outlier part, since the product itself stays in the weights' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 of the weight's shape, scale fp32 a row) of a matrix in any float dtype.

    A row of zeros has scale 0. Raises: FloatingPointError when the weight holds NaN or infinity.
    """
    if weight.ndim != 2:
        raise ValueError(f"row-wise int8 of a tensor of shape {tuple(weight.shape)}: expected a matrix")
    wide = weight.detach().float()
    largest = wide.abs().amax(dim=1)
    if not torch.isfinite(largest).all():
        raise FloatingPointError("weight with NaN or infinity")
    scale = largest / LARGEST
    inverse = torch.where(scale > 0, scale.reciprocal(), 0.0)
    codes = (wide * inverse[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return codes, scale


def dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that the codes stand for, multiplied in fp32 and rounded to `dtype`; no fp32 copy of the matrix."""
    return torch.mul(codes, scale[:, None], out=torch.empty(codes.shape, dtype=dtype, device=codes.device))

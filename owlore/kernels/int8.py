"""Weights in eight bits with one scale per row: W[i, j] = codes[i, j] * scale[i], scale[i] = max |W[i, :]| / 127.

Reference: Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339), section 2.1, row-wise absmax quantisation of the
weights. Deviation: there is no outlier part, since products are computed in the weights' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise int8 codes of a matrix.

    Args:
        weight: A matrix (m x n) of any float dtype.

    Returns:
        The codes (m x n, int8) and the scale of each row ((m,), fp32; 0 for a row of zeros).

    Raises:
        ValueError: The tensor is not a matrix.
        FloatingPointError: The weight holds NaN or infinity.
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
    """codes * scale, multiplied in fp32 and rounded to `dtype`, without an fp32 copy of the matrix."""
    return torch.mul(codes, scale[:, None], out=torch.empty(codes.shape, dtype=dtype, device=codes.device))

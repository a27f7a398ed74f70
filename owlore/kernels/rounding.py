"""Unbiased stochastic rounding from fp32 to a 16-bit format, with which updates below half an ulp are not lost."""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic_round(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round each value to one of its two neighbours with E[result] = value; exact values are kept.

    Args:
        values: Values in fp32.
        dtype: bfloat16 or float16.
        generator: Source of the random bits, on the device of `values`.

    Returns:
        The rounded values in `dtype`.

    Raises:
        ValueError: The dtype is not a 16-bit float.
    """
    if dtype == torch.bfloat16:
        return _to_bfloat16(values, generator)
    if dtype != torch.float16:
        raise ValueError(f"stochastic rounding to {dtype}: only bfloat16 and float16 are 16-bit floats")
    near = values.to(dtype)
    error = values - near.float()
    other = _neighbour(near, error)
    gap = (other.float() - near.float()).abs()
    chance = torch.where(gap > 0, error.abs() / gap, torch.zeros_like(gap))
    draw = torch.rand(values.shape, generator=generator, device=values.device)
    return torch.where((draw < chance) & torch.isfinite(other), other, near)


def _to_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Add random bits to the lower half of each float32 and drop that half; the upper half is the bfloat16.

    So the lower half gives the probability of the neighbour farther from zero, which is infinity beyond the largest
    bfloat16.
    """
    noise = torch.empty(values.shape, dtype=torch.int32, device=values.device).random_(1 << 16, generator=generator)
    bits = noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)


def _neighbour(near: Tensor, error: Tensor) -> Tensor:
    """The next representable number on the side of the exact value, near + error.

    IEEE floats are sign and magnitude: the next number away from zero is +1 on the bit pattern, towards zero it is -1,
    and next to zero it is the smallest subnormal with the sign of the error.
    """
    bits = near.view(torch.int16)
    away = (error > 0) == (near > 0)
    stepped = torch.where(away, bits + 1, bits - 1).view(near.dtype)
    smallest = torch.ones_like(bits).view(near.dtype)
    from_zero = torch.where(error > 0, smallest, -smallest)
    stepped = torch.where(near == 0, from_zero, stepped)
    return torch.where(error == 0, near, stepped)

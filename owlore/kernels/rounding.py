"""Stochastic rounding from fp32 to a 16-bit format: unbiased, so updates below half an ulp are not always lost."""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic_round(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`values` (fp32) in `dtype` (a 16-bit float), each rounded to one of its two neighbours with E[result] = value.

    A value that `dtype` represents exactly stays as it is. `generator` lives on the device of `values`.
    """
    if dtype == torch.bfloat16:
        return _cut(values, generator)
    if dtype != torch.float16:
        raise ValueError(f"stochastic rounding to {dtype}: only bfloat16 and float16 are 16-bit floats")
    near = values.to(dtype)
    error = values - near.float()
    other = _neighbour(near, error)
    gap = (other.float() - near.float()).abs()
    chance = torch.where(gap > 0, error.abs() / gap, torch.zeros_like(gap))
    draw = torch.rand(values.shape, generator=generator, device=values.device)
    return torch.where((draw < chance) & torch.isfinite(other), other, near)


def _cut(values: Tensor, generator: torch.Generator) -> Tensor:
    """To bfloat16, the upper half of a float32. The lower half is the chance of the neighbour farther from zero: random
    bits are added to it, and what it then holds is cut off. Beyond the largest bfloat16 lies infinity."""
    noise = torch.empty(values.shape, dtype=torch.int32, device=values.device).random_(1 << 16, generator=generator)
    bits = noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)


def _neighbour(near: Tensor, error: Tensor) -> Tensor:
    """The next representable number on the side where the true value lies.

    IEEE floats are sign and magnitude: away from zero is +1 on the bit pattern, towards zero is -1, and from zero it
    is the smallest subnormal with the sign of the error.
    """
    bits = near.view(torch.int16)
    away = (error > 0) == (near > 0)
    stepped = torch.where(away, bits + 1, bits - 1).view(near.dtype)
    smallest = torch.ones_like(bits).view(near.dtype)
    from_zero = torch.where(error > 0, smallest, -smallest)
    stepped = torch.where(near == 0, from_zero, stepped)
    return torch.where(error == 0, near, stepped)

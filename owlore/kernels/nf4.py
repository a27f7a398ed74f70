"""Weights in four bits: NormalFloat4 codes of blocks of 64 values, in plain torch on any device.

Reference: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3 and appendix E. Each block of the flat weight is
divided by its largest magnitude and every quotient replaced by the nearest of 16 values, the quantiles of a normal
distribution with an exact zero. With double quantisation the magnitudes are themselves codes: their mean is taken off
and blocks of 256 of them go through the 8-bit table of `quantised_state`.

A parameter costs 4 + 32/64 = 4.5 bits, or 4 + 8/64 + 32/(64*256) = 4.127 with double quantisation. Codes, packing
(the first value of a pair in the high half) and single magnitudes are bit for bit those of bitsandbytes; of the
double-quantised ones a few near ties go to the other neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from owlore.kernels import quantised_state

CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
CHUNK = 1 << 22  # values alive in fp32 at once: 16 MiB, whatever the matrix


@dataclass(frozen=True, kw_only=True)
class Nf4:
    """A quantised weight; every tensor lies on the weight's device.

    packed: uint8, two values a byte. absmax: the largest magnitude of each block, fp32, or uint8 codes of it when
    `scale` (fp32, one for 256 of them) and `offset` (fp32 scalar) are there. shape and block are those of `quantise`.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    block: int
    scale: Tensor | None = None
    offset: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by field; `replace(q, **tensors)` puts copies of them in place."""
        held = {"packed": self.packed, "absmax": self.absmax, "scale": self.scale, "offset": self.offset}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Nf4:
        moved: dict[str, Any] = {n: t.to(device, non_blocking=non_blocking) for n, t in self.tensors().items()}
        return replace(self, **moved)


def quantise(weight: Tensor, block: int = 64, double: bool = True) -> Nf4:
    """The nearest codes of `weight` (any shape and float dtype; a last block may be short).

    Raises: ValueError for an odd block, FloatingPointError when the weight holds NaN or infinity.
    """
    if block < 2 or block % 2:
        raise ValueError(f"block of {block} values: expected an even number of at least 2")
    flat = weight.detach().reshape(-1)
    step = max(CHUNK // block, 1) * block
    parts = [_quantise_flat(flat[start : start + step], block) for start in range(0, flat.numel(), step)]
    packed = torch.cat([p for p, _ in parts] or [torch.empty(0, dtype=torch.uint8, device=flat.device)])
    absmax = torch.cat([a for _, a in parts] or [torch.empty(0, device=flat.device)])
    if not torch.isfinite(absmax).all():
        raise FloatingPointError("weight with NaN or infinity")
    found = Nf4(packed=packed, absmax=absmax, shape=tuple(weight.shape), block=block)
    return _double(found) if double and absmax.numel() else found


def dequantise(quantised: Nf4, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The values that the codes stand for, multiplied in fp32 and rounded to `dtype`.

    `out` (contiguous, of the weight's shape) takes them instead of a new tensor, in its own dtype.
    """
    if out is None:
        out = torch.empty(quantised.shape, dtype=dtype, device=quantised.packed.device)
    flat, block = out.view(-1), quantised.block
    absmax, pairs = magnitudes(quantised), _pairs(quantised.packed.device)
    step = max(CHUNK // block, 1) * block
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        codes = quantised.packed[start // 2 : start // 2 + -(-part.numel() // 2)]
        values = pairs.index_select(0, codes.int()).view(-1)
        short = -values.numel() % block
        values = torch.nn.functional.pad(values, (0, short)) if short else values
        rows = values.view(-1, block).mul_(absmax[start // block : start // block + values.numel() // block, None])
        part.copy_(rows.view(-1)[: part.numel()])
    return out


def magnitudes(quantised: Nf4) -> Tensor:
    """The largest magnitude of each block, fp32."""
    if quantised.scale is None or quantised.offset is None:
        return quantised.absmax
    count = quantised.absmax.numel()
    codes = torch.nn.functional.pad(quantised.absmax, (0, -count % quantised_state.BLOCK))
    centred = quantised_state.Quantised(codes, quantised.scale, (count,), True)
    return quantised_state.dequantise(centred) + quantised.offset


def num_bytes(quantised: Nf4) -> int:
    """Bytes held, counted tensor by tensor."""
    return sum(tensor.numel() * tensor.element_size() for tensor in quantised.tensors().values())


def planned_bytes(count: int, block: int = 64, double: bool = True) -> int:
    """Bytes that `count` values will take, by formula."""
    blocks = -(-count // block)
    magnitude = blocks + 4 * -(-blocks // quantised_state.BLOCK) + 4 if double and blocks else 4 * blocks
    return -(-count // 2) + magnitude


def _quantise_flat(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Packed codes and magnitudes of a run of whole blocks (the last may be short)."""
    short = -flat.numel() % block
    blocks = torch.nn.functional.pad(flat.float(), (0, short)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    # The reciprocal, as in bitsandbytes: a division would put values on a boundary to the other side.
    shares = (blocks * absmax.clamp_min(1e-38).reciprocal()[:, None]).clamp_(-1.0, 1.0).view(-1)
    table = torch.tensor(CODES, device=flat.device)
    codes = torch.bucketize(shares, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8).view(-1, 2)
    packed = (codes[:, 0] << 4) | codes[:, 1]
    return packed[: -(-flat.numel() // 2)], absmax


def _double(single: Nf4) -> Nf4:
    offset = single.absmax.mean()
    centred = quantised_state.quantise(single.absmax - offset, signed=True)
    codes = centred.codes[: single.absmax.numel()].clone()
    return replace(single, absmax=codes, scale=centred.scales, offset=offset)


@lru_cache(maxsize=8)
def _pairs(device: torch.device) -> Tensor:
    """(256, 2): the two values that a byte stands for; one look-up a byte instead of two."""
    table = torch.tensor(CODES)
    byte = torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1).to(device)

"""Weights in four bits: NormalFloat4 codes of blocks of 64 values.

Reference: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3 and appendix E. Each block of the flat weight is
divided by its largest magnitude and every quotient replaced by the nearest of 16 values, the quantiles of a normal
distribution with an exact zero. With double quantisation the magnitudes are quantised too: their mean is subtracted,
and blocks of 256 of them are quantised with the 8-bit table of `quantised_state`.

A parameter takes 4 + 32/64 = 4.5 bits, or 4 + 8/64 + 32/(64*256) = 4.127 with double quantisation. Codes, packing
(the first value of a pair in the high half) and single magnitudes are bit for bit those of bitsandbytes; of the
double-quantised ones a few near ties are rounded to the other neighbour.

`quantise` and `dequantise` are plain torch on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from owlore.kernels import quantised_state

CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
CHUNK = 1 << 22  # values held in fp32 at once: 16 MiB, whatever the size of the matrix


@dataclass(frozen=True, kw_only=True)
class Nf4:
    """A quantised weight; every tensor is on the weight's device.

    Attributes:
        packed: The codes, uint8, two values per byte.
        absmax: The largest magnitude of each block: fp32, or uint8 codes with double quantisation.
        shape: Shape of the weight.
        block: Number of values in a block.
        scale: Scales of the magnitudes' codes, fp32, one for 256 codes; None without double quantisation.
        offset: Mean of the magnitudes, an fp32 scalar; None without double quantisation.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    block: int
    scale: Tensor | None = None
    offset: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, without those that are None."""
        held = {"packed": self.packed, "absmax": self.absmax, "scale": self.scale, "offset": self.offset}
        return {name: tensor for name, tensor in held.items() if tensor is not None}


def quantise(weight: Tensor, block: int = 64, double: bool = True) -> Nf4:
    """The nearest codes of a weight.

    Args:
        weight: A tensor of any shape and float dtype.
        block: Number of values that share a magnitude, even; the last block may be shorter.
        double: Whether the magnitudes are quantised too.

    Raises:
        ValueError: The block is odd or below 2.
        FloatingPointError: The weight holds NaN or infinity.
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


def dequantise(quantised: Nf4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight in `dtype`: each product of a code's value and its block's magnitude is rounded once, from fp32."""
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


def dequantise_fastest(quantised: Nf4, dtype: torch.dtype) -> Tensor:
    """`dequantise` to a dtype of at most 32 bits, on CUDA by bitsandbytes where it is installed."""
    if quantised.packed.is_cuda and _has_bitsandbytes():
        return dequantise_by_bitsandbytes(quantised, dtype)
    return dequantise(quantised, dtype)


@lru_cache(maxsize=1)
def _has_bitsandbytes() -> bool:
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


def dequantise_by_bitsandbytes(quantised: Nf4, dtype: torch.dtype) -> Tensor:
    """`dequantise` by bitsandbytes' kernel for the tensors' device, instead of torch's five.

    Note: the kernel gets a flat shape. Blocks do not end with a row, but its AVX-512 version would begin a new block
    with each row.
    """
    import bitsandbytes  # noqa: F401

    flat = torch.ops.bitsandbytes.dequantize_4bit.default(
        quantised.packed, magnitudes(quantised), quantised.block, "nf4", (math.prod(quantised.shape),), dtype
    )
    return flat.view(quantised.shape)


def magnitudes(quantised: Nf4) -> Tensor:
    """The largest magnitude of each block, fp32."""
    if quantised.scale is None or quantised.offset is None:
        return quantised.absmax
    count = quantised.absmax.numel()
    codes = torch.nn.functional.pad(quantised.absmax, (0, -count % quantised_state.BLOCK))
    centred = quantised_state.Quantised(codes, quantised.scale, (count,), True)
    return quantised_state.dequantise(centred) + quantised.offset


def planned_bytes(count: int, block: int = 64, double: bool = True) -> int:
    """Bytes of `count` values in NF4, with the arguments of `quantise`."""
    blocks = -(-count // block)
    magnitude = blocks + 4 * -(-blocks // quantised_state.BLOCK) + 4 if double and blocks else 4 * blocks
    return -(-count // 2) + magnitude


def _quantise_flat(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Packed codes and magnitudes of consecutive blocks; only the last may be shorter."""
    short = -flat.numel() % block
    blocks = torch.nn.functional.pad(flat.float(), (0, short)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    # Multiply by the reciprocal as bitsandbytes does: a division would round values on a boundary to the other side.
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
    """(256, 2): the two values of each byte, so that one look-up per byte is enough."""
    table = torch.tensor(CODES)
    byte = torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1).to(device)

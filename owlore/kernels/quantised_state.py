"""Optimizer moments in 8 bits: block-wise codes from a table of 256 values.

Reference: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), section 2: each
block of values is divided by its largest magnitude and every quotient replaced by the nearest of 256 values. Decade k
from the top of the table has 2^(7-k) (signed: 2^(6-k)) evenly spaced values, so that it covers seven decades, the
largest values most finely.

Deviation: the rounding is never stochastic; a block has 256 values, so that a value takes 8 + 32/256 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256
DECADES = 7


@dataclass(frozen=True)
class Quantised:
    """Quantised values.

    Attributes:
        codes: Codes, uint8, flat and padded to full blocks.
        scales: The largest magnitude of each block, fp32.
        shape: Shape of the values.
        signed: Whether the table of signed values is used.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    signed: bool


@lru_cache(maxsize=8)
def code_table(signed: bool, device: torch.device | None = None) -> Tensor:
    """The 256 values in [-1, 1] if `signed`, else [0, 1], ascending; 0 and 1 are among them.

    The table is cached, since a copy to a GPU synchronises.
    """
    values = [0.0, 1.0]
    for decade in range(DECADES):
        count = 2 ** (DECADES - 1 - decade) * (1 if signed else 2)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0**-decade
        values += middles.tolist()
        values += (-middles).tolist() if signed else []
    # Signed or not, the decades give 254 values; with 0 and 1 the codes fit in a byte.
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantise(values: Tensor, *, signed: bool) -> Quantised:
    """Nearest codes of `values` (fp32 and finite; non-negative unless `signed`)."""
    table = code_table(signed, values.device)
    flat = values.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    shares = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).clamp_(-1.0, 1.0)
    middles = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(shares, middles, out_int32=True).to(torch.uint8)
    return Quantised(codes.flatten(), scales, tuple(values.shape), signed)


def dequantise(state: Quantised) -> Tensor:
    """The values of the codes, fp32."""
    table = code_table(state.signed, state.codes.device)
    blocks = table[state.codes.int()].view(-1, BLOCK) * state.scales[:, None]
    count = int(torch.Size(state.shape).numel())
    return blocks.flatten()[:count].view(state.shape)


def quantised_bytes(count: int) -> int:
    """Bytes of `count` quantised values: one per value, padded to full blocks, and four per block for its scale."""
    blocks = -(-count // BLOCK)
    return blocks * (BLOCK + 4)

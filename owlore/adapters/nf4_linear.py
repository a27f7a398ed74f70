"""A linear map whose weight rests in NF4: the frozen base under a QDoTA adapter.

The weight is dequantised for each product and dropped again. On a CUDA device bitsandbytes, where installed, reads the
same codes; elsewhere plain torch does.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from owlore.kernels.nf4 import Nf4, dequantise, magnitudes, quantise


class Nf4Linear(nn.Module):
    """y = x W^T + b with W (outputs x inputs) in NF4; buffers hold it, so it moves and saves with the model."""

    packed: Tensor
    absmax: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, weight: Tensor, like: nn.Module, *, block: int = 64) -> None:
        """`weight` (outputs x inputs) takes the place of that of `like` (nn.Linear or Conv1D), whose bias is kept."""
        super().__init__()
        self.transposed = isinstance(like, Conv1D)
        self.out_features, self.in_features = int(weight.shape[0]), int(weight.shape[1])
        self.block, self.dtype = block, weight.dtype
        for name, tensor in quantise(weight, block).tensors().items():
            self.register_buffer(name, tensor)
        self.bias: nn.Parameter | None = getattr(like, "bias", None)

    @property
    def quantised(self) -> Nf4:
        return Nf4(
            packed=self.packed,
            absmax=self.absmax,
            shape=(self.out_features, self.in_features),
            block=self.block,
            scale=self.scale,
            offset=self.offset,
        )

    @property
    def weight(self) -> Tensor:
        """The codes, so that those who ask a layer's weight for its device find it."""
        return self.packed

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the codes stand for, (outputs x inputs)."""
        dtype = dtype or self.dtype
        if self.packed.is_cuda and has_bitsandbytes():
            return dequantise_by_bitsandbytes(self.quantised, dtype)
        return dequantise(self.quantised, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The layer without any adapter's terms; its backward keeps a dense weight, the adapters' own does not."""
        return nn.functional.linear(x, self.dense(x.dtype), self.bias)

    def as_plain(self, weight: Tensor) -> nn.Module:
        """A layer of the class that this one replaced, with `weight` (outputs x inputs)."""
        with torch.device("meta"):
            if self.transposed:
                plain: nn.Module = Conv1D(self.out_features, self.in_features)
            else:
                plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        stored = weight.T.contiguous() if self.transposed else weight
        plain.register_parameter("weight", nn.Parameter(stored, requires_grad=False))
        plain.register_parameter("bias", self.bias)
        return plain

    def _apply(self, fn: Any, recurse: bool = True) -> Nf4Linear:
        """Moves everything; a change of dtype is one of the computation, scale and offset stay fp32."""
        kept = {name: getattr(self, name) for name in ("scale", "offset")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                self.dtype = after.dtype
                setattr(self, name, before.to(after.device))
        return self


@lru_cache(maxsize=1)
def has_bitsandbytes() -> bool:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return False
    return True


def dequantise_by_bitsandbytes(quantised: Nf4, dtype: torch.dtype) -> Tensor:
    """The same values through bitsandbytes' kernel of the tensors' device.

    The kernel is given a flat shape: blocks run on over the rows, and the one for AVX-512 begins a block anew in each.
    """
    import bitsandbytes  # noqa: F401

    flat: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        quantised.packed, magnitudes(quantised), quantised.block, "nf4", (math.prod(quantised.shape),), dtype
    )
    return flat.view(quantised.shape)

"""A linear layer whose weight is stored in NF4: the frozen base layer of a QDoTA adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from owlore.kernels.nf4 import Nf4, dequantise_fastest, quantise


class Nf4Linear(nn.Module):
    """y = x W^T + b with W (outputs x inputs) in NF4.

    The tensors of the quantised weight are buffers, so that they are moved and saved with the model. The weight is
    dequantised for each product and is not kept.

    Args:
        weight: The weight (outputs x inputs) to quantise, of any float dtype.
        like: The nn.Linear or Conv1D that this layer replaces; its bias is kept.
    """

    packed: Tensor
    absmax: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, weight: Tensor, like: nn.Module) -> None:
        super().__init__()
        self.transposed = isinstance(like, Conv1D)
        self.out_features, self.in_features = int(weight.shape[0]), int(weight.shape[1])
        self.dtype = weight.dtype
        quantised = quantise(weight)
        self.block = quantised.block
        for name, tensor in quantised.tensors().items():
            self.register_buffer(name, tensor)
        self.bias: nn.Parameter | None = getattr(like, "bias", None)

    @property
    def weight(self) -> Tensor:
        """The codes, for code that reads the device of a layer's weight."""
        return self.packed

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised weight (outputs x inputs), in `dtype` or the dtype of the original."""
        shape, tensors = (self.out_features, self.in_features), dict(self.named_buffers(recurse=False))
        return dequantise_fastest(Nf4(shape=shape, block=self.block, **tensors), dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The layer without adapters; its backward keeps a dense weight, which that of an adapted layer does not."""
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
        """Move all tensors; a new dtype is that of the dequantised weight, while scale and offset stay fp32."""
        kept = {name: getattr(self, name) for name in ("scale", "offset")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                self.dtype = after.dtype
                setattr(self, name, before.to(after.device))
        return self

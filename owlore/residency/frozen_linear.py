"""A frozen linear map that saves nothing for backward.

For y = x W^T (+ b) with W frozen, backward needs W alone: dx = dy W. torch's own saves the dense W; here both ways
ask the block's lease for it, so a quantised block holds one dense matrix at a time and nothing outlives the lease.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from owlore.kernels.linear import apply_linear, input_gradient
from owlore.residency.blob_layout import Weight


class PackedWeight:
    """The quantised matrix of one module. Readable only while its block is leased."""

    def __init__(self, weight: Weight, block: int) -> None:
        self.weight, self.block = weight, block
        self.fields: Mapping[str, Tensor] | None = None
        self.keeps = False  # the dense matrix is made once a lease, for all the micro-batches that it serves
        self._dense: Tensor | None = None

    def lend(self, fields: Mapping[str, Tensor] | None, *, keeps: bool = False) -> None:
        """A lease begins with these fields, or ends with none."""
        self.fields, self.keeps, self._dense = fields, keeps, None

    def dense(self) -> Tensor:
        if self.fields is None:
            raise RuntimeError(f"{self.weight.name} of block {self.block} was read outside of a lease")
        if self._dense is not None:
            return self._dense
        dense = self.weight.form.dense(self.fields, self.weight.shape, self.weight.dtype)
        if self.keeps:
            self._dense = dense
        return dense


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.weight, ctx.transposed = weight, transposed
        return apply_linear(x, weight.dense(), bias, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W = ctx.weight.dense().to(grad.dtype)
        return input_gradient(grad, W, ctx.transposed), None, None, None


def frozen_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, *, transposed: bool = False) -> Tensor:
    """x W^T + b; autocast's dtype is taken where it is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            cast = _Cast(weight, dtype)
            return _FrozenLinear.apply(x.to(dtype), cast, None if bias is None else bias.to(dtype), transposed)
    return _FrozenLinear.apply(x, weight, bias, transposed)


class _Cast(PackedWeight):
    """A packed weight whose dense matrix comes in another dtype."""

    def __init__(self, inner: PackedWeight, dtype: torch.dtype) -> None:
        self.inner, self.dtype = inner, dtype

    def dense(self) -> Tensor:
        return self.inner.dense().to(self.dtype)

"""A frozen linear map that saves nothing for backward.

For y = x W^T (+ b) with W frozen, backward needs W alone: dx = dy W. torch's own linear saves the dense W. Here forward
and backward both dequantise it from the leased block, so one dense matrix exists at a time and none outlives the lease.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from owlore.kernels.linear import apply_linear, input_gradient
from owlore.residency.blob_layout import Weight


class PackedWeight:
    """The quantised matrix of one linear map, readable only while its block is leased."""

    def __init__(self, weight: Weight, block: int) -> None:
        self.weight, self.block = weight, block
        self.fields: Mapping[str, Tensor] | None = None
        self._caches_dense = False
        self._dense: Tensor | None = None

    def set_fields(self, fields: Mapping[str, Tensor] | None, *, cache_dense: bool = False) -> None:
        """Begin a lease with the tensors of the format, or end it with None.

        Args:
            fields: field -> tensor on the device.
            cache_dense: whether the dense matrix is kept until the lease ends, for several micro-batches.
        """
        self.fields, self._caches_dense, self._dense = fields, cache_dense, None

    def dense(self) -> Tensor:
        """The dequantised matrix.

        Raises:
            RuntimeError: the block is not leased.
        """
        if self.fields is None:
            raise RuntimeError(f"{self.weight.name} of block {self.block} was read outside of a lease")
        if self._dense is not None:
            return self._dense
        dense = self.weight.form.dense(self.fields, self.weight.shape, self.weight.dtype)
        if self._caches_dense:
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
    """x W^T + b without saving W, in the dtype of autocast where it is enabled.

    Args:
        x: (..., in).
        weight: W, (out, in), or (in, out) with `transposed`.
        bias: b, (out,).
        transposed: whether W lies transposed, as in transformers' Conv1D.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            cast = _Cast(weight, dtype)
            return _FrozenLinear.apply(x.to(dtype), cast, None if bias is None else bias.to(dtype), transposed)
    return _FrozenLinear.apply(x, weight, bias, transposed)


class _Cast(PackedWeight):
    """A packed weight whose dense matrix is cast to another dtype."""

    def __init__(self, inner: PackedWeight, dtype: torch.dtype) -> None:
        self.inner, self.dtype = inner, dtype

    def dense(self) -> Tensor:
        return self.inner.dense().to(self.dtype)

"""A trained linear map that projects its gradient without computing the full one.

Backward of y = x W^T has dW = dy^T x, of the weight's size, from which the projection keeps rank r. With the basis
known, P goes into the product instead: dW P = dy^T (x P), or P^T dW = (dy P)^T x, for 2 T r (m + n) operations instead
of 2 T m n + 2 r m n over T tokens, and without the m x n tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from owlore.kernels.linear import apply_linear, input_gradient, input_of, linear_kind, rows_of
from owlore.patches import PatchStack, Undo

# (left of T x m, right of T x n) -> None where left^T right, the gradient, was accumulated; else that gradient.
Take = Callable[[Tensor, Tensor], Tensor | None]


class LinearMap(NamedTuple):
    """A plain linear map.

    Attributes:
        module: the module.
        transposed: whether its weight is stored transposed (transformers' Conv1D).
    """

    module: nn.Module
    transposed: bool


def linear_maps(modules: Iterable[nn.Module]) -> dict[int, LinearMap]:
    """The plain linear map of each matrix that only one of them uses, by the matrix's id."""
    found: dict[int, list[LinearMap]] = {}
    for module in modules:
        for child in module.modules():
            transposed = linear_kind(child)
            if transposed is not None:
                found.setdefault(id(child.weight), []).append(LinearMap(child, transposed))
    return {matrix: users[0] for matrix, users in found.items() if len(users) == 1}


def tap(layer: LinearMap, take: Take, patches: PatchStack) -> Undo:
    """Pass the factors of the gradient of a linear map's matrix to `take`, instead of computing the gradient.

    The gradient is computed as usual where it comes from elsewhere (another use of the matrix, autocast), and where the
    matrix has backward hooks, which expect it.

    Args:
        layer: the linear map.
        take: is given the factors; returns the gradient where it does not accumulate them.
        patches: the stack on which the replaced forward is registered.

    Returns:
        A function that ends this.
    """
    module, transposed = layer
    forward = module.forward

    @wraps(forward)
    def run(*args: Tensor, **named: Tensor) -> Tensor:
        x = input_of(args, named)
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or module.weight._backward_hooks:
            plain: Tensor = forward(x)
            return plain
        return _ProjectedLinear.apply(x, module.weight, module.bias, transposed, take)

    return patches.replace_forward(module, run)


class _ProjectedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, take: Take) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.take = transposed, take
        return apply_linear(x, weight, bias, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = input_gradient(grad, weight, ctx.transposed) if need_input else None
        dy, flat = rows_of(grad), rows_of(x)
        dW = None
        if need_weight:
            dW = ctx.take(flat, dy) if ctx.transposed else ctx.take(dy, flat)
        return dx, dW, dy.sum(0) if need_bias else None, None, None

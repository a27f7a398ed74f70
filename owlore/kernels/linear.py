"""The plain linear layers of a model, y = x W^T + b, stored as (outputs, inputs) or transposed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def linear_kind(module: nn.Module) -> bool | None:
    """Whether a linear layer stores its weight transposed, as GPT-2's Conv1D does.

    Returns:
        True or False; None for a module that is not a plain linear layer. A module whose `forward` was replaced on the
        instance is not plain, since it may compute something else.
    """
    if "forward" in vars(module):
        return None
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return False
    if type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).ndim == 2:
        return True
    return None


def apply_linear(x: Tensor, W: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x W^T + b for W of (outputs, inputs), or x W + b for a transposed W of (inputs, outputs)."""
    if not transposed:
        return F.linear(x, W, bias)
    flat = rows_of(x)
    y = flat @ W if bias is None else torch.addmm(bias, flat, W)
    return y.view(*x.shape[:-1], y.shape[-1])


def input_gradient(grad: Tensor, W: Tensor, transposed: bool) -> Tensor:
    """The gradient of `apply_linear`'s input from that of its output."""
    dx = rows_of(grad) @ (W.T if transposed else W)
    return dx.view(*grad.shape[:-1], dx.shape[-1])


def input_of(args: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> Tensor:
    """The single tensor that a linear layer is called with, by position or by name."""
    (x,) = (*args, *named.values())
    return x


def rows_of(x: Tensor) -> Tensor:
    """x of any leading shape as (tokens, width)."""
    return x.reshape(-1, x.shape[-1])

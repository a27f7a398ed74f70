"""The plain linear maps of a model, y = x W^T + b, and their stored form."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def linear_kind(module: nn.Module) -> bool | None:
    """Whether a linear map stores its weight transposed; None for a module that is no plain linear map.

    Plain: it computes what its class does (nothing was set on it as `forward`), so that the map is known.
    """
    if "forward" in vars(module):
        return None
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return False
    if type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).ndim == 2:
        return True
    return None


def apply_linear(x: Tensor, W: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x W^T + b for W of (outputs, inputs), or x W + b where it is stored transposed, as GPT-2's Conv1D does."""
    if not transposed:
        return F.linear(x, W, bias)
    flat = rows_of(x)
    y = flat @ W if bias is None else torch.addmm(bias, flat, W)
    return y.view(*x.shape[:-1], y.shape[-1])


def input_gradient(grad: Tensor, W: Tensor, transposed: bool) -> Tensor:
    """dx of `apply_linear` from dy."""
    dx = rows_of(grad) @ (W.T if transposed else W)
    return dx.view(*grad.shape[:-1], dx.shape[-1])


def input_of(args: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> Tensor:
    """The one tensor that a linear map is called with, by position or by whatever name its class has for it."""
    (x,) = (*args, *named.values())
    return x


def rows_of(x: Tensor) -> Tensor:
    """(tokens, width) of any leading shape."""
    return x.reshape(-1, x.shape[-1])

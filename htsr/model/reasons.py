"""Why a tensor has no spectrum here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from htsr.model.source import TensorInfo

MIN_SIDE = 8  # weightwatcher's own limit: fewer singular values make no spectrum


def why_not(tensor: TensorInfo, *, convolution: bool, bias: bool) -> str:
    """Why a tensor has no spectrum here; empty when it has one.

    Args:
        tensor: its name, shape and dtype.
        convolution: whether its name says that it is a kernel; a 3-D one is no stack of matrices then.
        bias: whether its name says that its rows are biases, of several experts.
    """
    shape = tensor.shape
    if tensor.note:
        return tensor.note
    if len(shape) < 2:
        return f"{len(shape)}-D: not a matrix"
    if bias:
        return f"{len(shape)}-D: biases, not a matrix"
    if not tensor.readable:
        return f"stored as {tensor.dtype}: codes or integers, not the weights themselves"
    if len(shape) > 4 or (len(shape) == 3 and convolution):
        return f"{len(shape)}-D (a convolution): only matrices and 2-D convolutions are analysed"
    values = min(shape) if len(shape) == 2 else min(shape[1:] if len(shape) == 3 else shape[:2])
    values *= math.prod(shape[2:]) if len(shape) == 4 else 1
    return too_small(values, " in each matrix of the stack" if len(shape) == 3 else "")


def too_small(values: int, where: str = "") -> str:
    """Why a matrix with this many singular values has no spectrum; empty when it has one."""
    if values >= MIN_SIDE:
        return ""
    plural = "" if values == 1 else "s"
    return f"only {values} singular value{plural}{where}, at least {MIN_SIDE} make a spectrum"

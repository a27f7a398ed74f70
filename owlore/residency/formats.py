"""The formats in which a frozen matrix is stored and copied: its own bits, row-wise int8, or NF4.

Each format has three methods. `fields` gives dtype and shape of the tensors that represent a matrix, from its shape and
dtype alone, so that a plan needs no weights. `pack` computes these tensors from a matrix. `dense` computes the matrix
from the tensors, by field, in the given shape and dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from owlore.kernels import int8, nf4, quantised_state

Fields = dict[str, tuple[torch.dtype, tuple[int, ...]]]
BLOCK = 64  # values that share a magnitude in NF4


class Raw:
    """The weight's own bits."""

    name = "bf16"
    exact = True

    def fields(self, shape: tuple[int, ...], dtype: torch.dtype) -> Fields:
        return {"weight": (dtype, shape)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight.detach()}

    def dense(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return tensors["weight"]


class Int8:
    """One byte a value and a scale a row."""

    name = "int8"
    exact = False

    def fields(self, shape: tuple[int, ...], dtype: torch.dtype) -> Fields:
        return {"codes": (torch.int8, shape), "scale": (torch.float32, shape[:1])}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        codes, scale = int8.quantise(weight)
        return {"codes": codes, "scale": scale}

    def dense(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return int8.dequantise(tensors["codes"], tensors["scale"], dtype)


class NF4:
    """4-bit NormalFloat with double quantisation of the magnitudes: 4.127 bits a value."""

    name = "nf4"
    exact = False

    def fields(self, shape: tuple[int, ...], dtype: torch.dtype) -> Fields:
        count = int(torch.Size(shape).numel())
        blocks = -(-count // BLOCK)
        return {
            "packed": (torch.uint8, (-(-count // 2),)),
            "absmax": (torch.uint8, (blocks,)),
            "scale": (torch.float32, (-(-blocks // quantised_state.BLOCK),)),
            "offset": (torch.float32, ()),
        }

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        return nf4.quantise(weight, block=BLOCK, double=True).tensors()

    def dense(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        weight = nf4.Nf4(shape=shape, block=BLOCK, **tensors)
        return nf4.dequantise_fastest(weight, dtype)


Format = Raw | Int8 | NF4
FORMATS: dict[str, Format] = {form.name: form for form in (Raw(), Int8(), NF4())}

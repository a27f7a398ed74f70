"""How the tensors of a block lie in one blob, so that a block travels in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from owlore.residency.formats import Format

ALIGNMENT = 256  # bytes; what CUDA allocations have, so that a view is as good as a tensor of its own


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of a block: its name inside the block, shape, dtype, and the format in which it is kept."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    form: Format


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Where one field of a weight lies in the blob."""

    weight: str
    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class BlobLayout:
    """The weights of a block in the order of the blob. Blocks of one kind have equal layouts."""

    weights: tuple[Weight, ...]

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        pieces, offset = [], 0
        for weight in self.weights:
            for field, (dtype, shape) in weight.form.fields(weight.shape, weight.dtype).items():
                size = int(torch.Size(shape).numel()) * dtype.itemsize
                pieces.append(Piece(weight=weight.name, field=field, dtype=dtype, shape=shape, offset=offset,
                                    num_bytes=size))  # fmt: skip
                offset += -(-size // ALIGNMENT) * ALIGNMENT
        return tuple(pieces)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of a blob, with its alignment."""
        return sum(-(-piece.num_bytes // ALIGNMENT) * ALIGNMENT for piece in self.pieces)

    @property
    def exact(self) -> bool:
        """Does the blob hold every weight's own bits?"""
        return all(weight.form.exact for weight in self.weights)

    def views(self, blob: Tensor) -> dict[str, dict[str, Tensor]]:
        """weight -> field -> view of the blob (uint8, flat)."""
        found: dict[str, dict[str, Tensor]] = {weight.name: {} for weight in self.weights}
        for piece in self.pieces:
            flat = blob[piece.offset : piece.offset + piece.num_bytes].view(piece.dtype)
            found[piece.weight][piece.field] = flat.view(piece.shape)
        return found

    def fill(self, blob: Tensor, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Pack exact tensors into the blob, one after another; they may lie anywhere.

        A lossy form is made on `device`, always the same one, so that the same weights always give the same codes.
        """
        views = self.views(blob)
        for weight in self.weights:
            tensor = tensors[weight.name]
            packed = weight.form.pack(tensor if weight.form.exact else tensor.to(device))
            for field, value in packed.items():
                views[weight.name][field].copy_(value)

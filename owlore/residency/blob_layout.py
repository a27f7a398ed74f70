"""The layout of a block's tensors in one blob, so that a block is copied at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from owlore.residency.formats import Format

ALIGNMENT = 256  # bytes; CUDA allocations have it too, so kernels treat a view like a tensor of its own
Views = Mapping[str, Mapping[str, Tensor]]  # weight -> field -> view of a blob


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of a block by its name inside the block, and the format in which it is kept."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    form: Format


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The place of one field of a weight in the blob; `offset` and `num_bytes` in bytes."""

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
                offset += _aligned(size)
        return tuple(pieces)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of a blob, with its alignment."""
        return sum(_aligned(piece.num_bytes) for piece in self.pieces)

    @property
    def exact(self) -> bool:
        """Whether the blob holds every weight's own bits."""
        return all(weight.form.exact for weight in self.weights)

    def views(self, blob: Tensor) -> dict[str, dict[str, Tensor]]:
        """Views of a blob (uint8, flat): weight -> field -> view."""
        found: dict[str, dict[str, Tensor]] = {weight.name: {} for weight in self.weights}
        for piece in self.pieces:
            flat = blob[piece.offset : piece.offset + piece.num_bytes].view(piece.dtype)
            found[piece.weight][piece.field] = flat.view(piece.shape)
        return found

    def fill(self, blob: Tensor, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Pack exact tensors into a blob, one after another.

        Args:
            blob: uint8, flat, `num_bytes` long.
            tensors: the exact weights by name inside the block, on any device.
            device: where a lossy format is computed; always the same one, so that equal weights give equal codes.
        """
        views = self.views(blob)
        for weight in self.weights:
            tensor = tensors[weight.name]
            packed = weight.form.pack(tensor if weight.form.exact else tensor.to(device))
            for field, value in packed.items():
                views[weight.name][field].copy_(value)

"""Writing a safetensors file one tensor at a time, without all of them in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htsr.model.safetensors_files import DTYPES
from htsr.model.source import ITEM_BYTES

CODES = {name: code for code, name in DTYPES.items()}
Pieces = Iterable[memoryview]


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The dtype of a tensor, by its name in torch, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def outline(tensor: Tensor) -> Outline:
    """The dtype and the shape of a tensor."""
    return Outline(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))


def write_tensors(
    path: Path,
    outlines: Mapping[str, Outline],
    give: Callable[[str], Pieces],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors in the order of `outlines`.

    Args:
        path: The file.
        outlines: Dtype and shape of each tensor by its name.
        give: Yields the bytes of a tensor by its name.
        metadata: Metadata of the file.

    Raises:
        ValueError: The number of bytes of a tensor does not fit its dtype and shape.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, what in outlines.items():
        begin, end = end, end + what.num_bytes
        header[name] = {"dtype": CODES[what.dtype], "shape": list(what.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, what in outlines.items():
            written = sum(file.write(piece) for piece in give(name))
            if written != what.num_bytes:
                raise ValueError(f"{name}: got {written} bytes, expected {what.num_bytes} for {what}")


def aligned(outlines: Mapping[str, Outline]) -> dict[str, Outline]:
    """The order in which every tensor is aligned to its item size: wide dtypes first, then by name."""
    return dict(sorted(outlines.items(), key=lambda pair: (-ITEM_BYTES[pair[1].dtype], pair[0])))


def pieces(tensor: Tensor) -> Pieces:
    """The bytes of a tensor in row-major order."""
    plain = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
    array: Any = plain.numpy()
    yield memoryview(array)

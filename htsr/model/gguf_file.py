"""GGUF files: tensors dequantised a block at a time, labelled with the type they were stored in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.errors import BadInput
from htsr.model.locate import inside
from htsr.model.parts import flat_shape
from htsr.model.source import DEQUANTISED, Source, TensorInfo

if TYPE_CHECKING:
    import torch

PIECE_BYTES = 1 << 20
PLAIN = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GgufSource(Source):
    """A .gguf file. Shapes are those of the matrices (rows first), names are the file's own."""

    def __init__(self, path: Path, id_: str) -> None:
        self._gguf = import_gguf(path)
        self.id, self.path = id_, path
        self._file = inside(path.parent, path)
        try:
            tensors = self._gguf.GGUFReader(self._file).tensors
        except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
            raise BadInput(
                f"{path.name}: got a damaged GGUF file ({error}), expected one that llama.cpp reads"
            ) from error
        self._stored = {t.name: (t.tensor_type, int(t.data_offset), int(t.n_bytes)) for t in tensors}
        self.tensors = tuple(map(_info, tensors))

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """What transformers derives from the file's metadata; None for an architecture it does not know."""
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        try:
            return dict(load_gguf_checkpoint(str(self._file), return_tensors=False)["config"])
        except (ValueError, KeyError, NotImplementedError):
            return None

    def window(self, name: str, rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
        _, width = flat_shape(self.info(name).shape)
        values, _ = self._gguf.GGML_QUANT_SIZES[self._stored[name][0]]
        low = cols[0] // values * values  # whole quantisation blocks
        high = min(-(-cols[1] // values) * values, width)
        window = self._dequantise(name, width, *rows, low, high)
        return np.ascontiguousarray(window[:, cols[0] - low : cols[1] - low])

    def _dequantise(self, name: str, cols: int, r0: int, r1: int, c0: int, c1: int) -> np.ndarray:
        """Rows r0:r1, columns c0:c1 (multiples of the type's own block) of a tensor seen as a matrix `cols` wide."""
        kind, offset, _ = self._stored[name]
        values, size = self._gguf.GGML_QUANT_SIZES[kind]  # this many values lie in this many bytes
        row_bytes = cols // values * size
        mapped = np.memmap(self._file, np.uint8, "r", offset + r0 * row_bytes, (r1 - r0, row_bytes))
        data = np.array(mapped[:, c0 // values * size : -(-c1 // values) * size], order="C")
        if kind.name in ("F64", "F32", "F16"):
            return data.view(PLAIN[kind.name])
        return self._gguf.quants.dequantize(data, kind).astype(np.float32, copy=False)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        info = self.info(name)
        if len(info.shape) <= 1:
            values = self._dequantise(name, info.numel, 0, 1, 0, info.numel).reshape(info.shape)
            tensor = torch.from_numpy(values)
            tensor = tensor[start:stop] if info.shape else tensor
        else:
            inner = math.prod(info.shape[1:-1])
            values = self._dequantise(name, info.shape[-1], start * inner, stop * inner, 0, info.shape[-1])
            tensor = torch.from_numpy(values).reshape(stop - start, *info.shape[1:])
        return tensor.to(torch.bfloat16) if info.dtype == "bfloat16" else tensor

    def raw(self, name: str) -> Iterator[memoryview]:
        _, offset, num_bytes = self._stored[name]
        with self._file.open("rb") as handle:
            handle.seek(offset)
            for position in range(0, num_bytes, PIECE_BYTES):
                yield memoryview(handle.read(min(PIECE_BYTES, num_bytes - position)))


def import_gguf(path: Path) -> Any:
    """Import the package `gguf`; a missing package is a BadInput that names the file and the package."""
    try:
        import gguf
    except ImportError as error:
        raise BadInput(
            f"{path.name}: got a GGUF file, expected the package `gguf` to read it; pip install 'htsr-owlore[gguf]'"
        ) from error
    return gguf


def _info(tensor: Any) -> TensorInfo:
    kind, shape = tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape))
    return TensorInfo(name=tensor.name, shape=shape, dtype=PLAIN.get(kind, DEQUANTISED + kind))

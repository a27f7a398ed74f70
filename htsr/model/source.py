"""A model as a list of named tensors that are read a slice at a time.

    source = open_source("demo")      # see htsr.model.open
    source.tensors                    # names, shapes and dtypes; no weights are read for this
    source.rows(name, 0, 100)         # a torch tensor in the stored dtype

torch is imported only where a method returns a torch tensor: reading spectra needs NumPy alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.errors import NotFound
from htsr.model.names import tied_copies
from htsr.model.parts import flat_shape
from htsr.numerics.spectrum import MatrixSlice

if TYPE_CHECKING:
    import torch
    from torch import nn

    from htsr.model.layers import LayerView

DEQUANTISED = "dequantised:"
COMPUTED = (DEQUANTISED, "delta:", "merged:")  # values that are made from what is stored
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
    "complex64": 8,
}  # fmt: skip
READABLE = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: the stored dtype; of quantised weights it is like `dequantised:Q4_1`.
        note: why the tensor cannot be read as weights; empty when it can.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    note: str = ""

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def readable(self) -> bool:
        """Whether the values are real numbers as they stand (and not codes that need a scale from elsewhere)."""
        return self.dtype in READABLE or self.dtype.startswith(COMPUTED)

    @property
    def num_bytes(self) -> int:
        """Bytes of the values as `rows` returns them."""
        return self.numel * ITEM_BYTES.get(self.dtype, 4)


class Source(ABC):
    """Named tensors of one model. Subclasses say how a window of one and its stored bytes are read.

    Attributes:
        is_delta: whether the tensors are differences, whose scale means nothing: eigenvalues are cut relative to the
            largest.
        base: the model that these values were computed against, else None.
        numbered: whether the integers in names are the numbers of the blocks, although some blocks have no tensor here.
        complete: whether the files at `path` hold these weights, so that other programs may load them from there.
        id: the model as the user named it.
        revision: the commit of a model from the Hugging Face Hub, else None.
        path: the directory or file, None for a model in memory.
        module: the nn.Module, for a model in memory.
        tensors: name, shape and dtype of every tensor.
    """

    is_delta: bool = False
    base: Source | None = None
    numbered: bool = False
    complete: bool = True

    id: str
    revision: str | None = None
    path: Path | None = None
    module: nn.Module | None = None
    tensors: tuple[TensorInfo, ...] = ()

    @property
    def config(self) -> dict[str, Any] | None:
        """The model's configuration (config.json), None when there is none."""
        return None

    def info(self, name: str) -> TensorInfo:
        """The entry of `tensors` with that name."""
        if not hasattr(self, "_by_name"):
            self._by_name = {t.name: t for t in self.tensors}
        if name not in self._by_name:
            raise NotFound(f"got the tensor name {name!r}, expected one of {self.id}'s {len(self.tensors)} tensors")
        return self._by_name[name]

    @abstractmethod
    def window(self, name: str, rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
        """Read rows and columns of a tensor seen as a matrix (`parts.flat_shape`).

        Args:
            name: the tensor.
            rows: first row and the one after the last.
            cols: first column and the one after the last.

        Returns:
            A C-contiguous array of a float type that NumPy knows.
        """

    def array(self, name: str, block: MatrixSlice) -> np.ndarray:
        """Rows or columns of a tensor seen as a matrix."""
        return self.window(name, *block.window(*flat_shape(self.info(name).shape)))

    def in_memory(self, name: str) -> torch.Tensor | None:
        """A tensor seen as a matrix, in its dtype and on its device, when it is in memory; else None."""
        return None

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """float64 B (rows, r) and A (r, cols) of a tensor that is the product of two thin matrices, else None."""
        return None

    def relative_change(self, view: LayerView) -> float | None:
        """||W - W_base|| / ||W_base|| of a matrix, for a source that knows a base which has it, else None."""
        return None

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Slice `start` to `stop` of dimension 0 in the stored dtype (float32 when computed or dequantised)."""
        import torch

        shape = self.info(name).shape
        height, width = flat_shape(shape)
        per = height // shape[0]
        values = self.window(name, (start * per, stop * per), (0, width)).astype(np.float32)
        return torch.from_numpy(values).reshape(stop - start, *shape[1:])

    @abstractmethod
    def raw(self, name: str) -> Iterator[memoryview]:
        """The stored bytes, in order, a piece at a time."""

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in the stored dtype (float32 when dequantised)."""
        shape = self.info(name).shape
        return self.rows(name, 0, shape[0] if shape else 1)

    def tensor_sha256(self, name: str) -> str:
        """sha256 of a tensor's stored bytes, which are read once for all threads."""
        known: dict[str, str] = self.__dict__.setdefault("_digests", {})
        locks: dict[str, threading.Lock] = self.__dict__.setdefault("_hashing", {})
        with locks.setdefault(name, threading.Lock()):
            if name not in known:
                digest = hashlib.sha256()
                for piece in self.raw(name):
                    digest.update(piece)
                known[name] = digest.hexdigest()
            return known[name]

    def weights_sha256(self) -> str:
        """sha256 over the sorted (name, dtype, shape, sha256 of the bytes) of all tensors, whatever files hold them."""
        digest = hashlib.sha256()
        for tensor in sorted(self.tensors, key=lambda t: t.name):
            entry = [tensor.name, tensor.dtype, list(tensor.shape), self.tensor_sha256(tensor.name)]
            digest.update(json.dumps(entry).encode() + b"\n")
        return digest.hexdigest()

    def config_sha256(self) -> str | None:
        """sha256 of the configuration as canonical JSON."""
        if self.config is None:
            return None
        return hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode()).hexdigest()


def without_tied(tensors: list[TensorInfo], config: Mapping[str, Any] | None) -> tuple[TensorInfo, ...]:
    """The tensors without a stored second copy of the embeddings that the configuration calls tied."""
    copies = tied_copies(tensors, config)
    return tuple(t for t in tensors if t.name not in copies)

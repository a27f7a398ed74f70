"""Safetensors files: headers are checked, and tensors are read a part at a time without mapping the file.

(A mapped file would count as resident memory as far as it has been touched: reading a model would cost its size.)
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np

from htsr.errors import BadInput
from htsr.files import refuse_constant
from htsr.model.locate import inside, read_config
from htsr.model.parts import flat_shape
from htsr.model.source import ITEM_BYTES, Source, TensorInfo, without_tied

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_INDEX_BYTES = 64_000_000
MAX_TENSORS = 500_000
PIECE_BYTES = 1 << 20
HELD_BYTES = 1 << 22  # a tensor up to this size is read once for its hash and its spectrum
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where the bytes of a tensor lie."""

    info: TensorInfo
    file: Path
    offset: int
    num_bytes: int


class SafetensorsSource(Source):
    """A directory of safetensors (one file or shards named by an index) or a lone .safetensors file."""

    def __init__(self, path: Path, id_: str, revision: str | None = None) -> None:
        self.id, self.revision, self.path = id_, revision, path
        index = read_index(path) if path.is_dir() else {}
        files = named_files(path, index) if path.is_dir() else {path.name: inside(path.parent, path)}
        self._held = threading.local()
        self._entries: dict[str, Entry] = {}
        # The entries of each file by the file's own name (the Hub cache's have others), in the order of their bytes.
        self.files: dict[str, tuple[Entry, ...]] = {}
        for plain, file in files.items():
            self.files[plain] = tuple(sorted(read_header(file), key=lambda entry: entry.offset))
            for entry in self.files[plain]:
                if entry.info.name in self._entries:
                    _refuse(file, f"tensor {entry.info.name!r} is in another file too", "each tensor once")
                self._entries[entry.info.name] = entry
        for tensor, name in index.items():
            if tensor not in self._entries or self._entries[tensor].file != files[name]:
                expected = "a file that holds it; the download may be incomplete"
                _refuse(path / INDEX, f"tensor {tensor!r} placed in {name}", expected)
        self.tensors = without_tied([e.info for e in self._entries.values()], self.config)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        assert self.path is not None
        return read_config(self.path)

    def window(self, name: str, rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
        dtype = self.info(name).dtype
        stored = "uint16" if dtype == "bfloat16" else dtype
        values = self._read_window(self._entries[name], rows, cols, np.dtype(stored))
        if dtype == "bfloat16":  # the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def _read_window(self, entry: Entry, rows: tuple[int, int], cols: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        height, width = flat_shape(entry.info.shape)
        if getattr(self._held, "name", None) == entry.info.name:
            matrix = self._held.bytes.view(dtype).reshape(height, width)
            return np.ascontiguousarray(matrix[rows[0] : rows[1], cols[0] : cols[1]])
        out = np.empty((rows[1] - rows[0], cols[1] - cols[0]), dtype)
        with entry.file.open("rb", buffering=0) as handle:
            if out.shape[1] == width:
                _read_into(handle, entry.offset + rows[0] * width * dtype.itemsize, out)
                return out
            for row, into in enumerate(out, start=rows[0]):
                _read_into(handle, entry.offset + (row * width + cols[0]) * dtype.itemsize, into)
        return out

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        info, entry = self.info(name), self._entries[name]
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        row_bytes = entry.num_bytes // max(info.shape[0], 1) if info.shape else entry.num_bytes
        out = torch.empty(math.prod(shape) * ITEM_BYTES[info.dtype], dtype=torch.uint8)
        with entry.file.open("rb", buffering=0) as handle:
            _read_into(handle, entry.offset + start * row_bytes, out.numpy())
        return out.view(getattr(torch, info.dtype)).reshape(shape)

    def raw(self, name: str) -> Iterator[memoryview]:
        entry = self._entries[name]
        with entry.file.open("rb", buffering=0) as handle:
            if 0 < entry.num_bytes <= HELD_BYTES:
                yield self._hold(handle, entry).data
                return
            buffer = bytearray(PIECE_BYTES)
            for position in range(0, entry.num_bytes, PIECE_BYTES):
                piece = memoryview(buffer)[: min(PIECE_BYTES, entry.num_bytes - position)]
                _read_into(handle, entry.offset + position, piece)
                yield piece

    def _hold(self, handle: BinaryIO, entry: Entry) -> np.ndarray:
        """Read the bytes of a tensor, and hold them for the windows of it that this thread reads next."""
        self._held.name, out = None, np.empty(entry.num_bytes, np.uint8)
        _read_into(handle, entry.offset, out)
        out.flags.writeable = False
        self._held.name, self._held.bytes = entry.info.name, out
        return out


def named_files(directory: Path, index: Mapping[str, str]) -> dict[str, Path]:
    """The weight files of a directory by name: model.safetensors, else the index's shards, else every *.safetensors."""
    names = [SINGLE] if _there(directory / SINGLE) else sorted(set(index.values()))
    names = names or sorted(file.name for file in directory.glob("*.safetensors"))
    if names == ["adapter_model.safetensors"]:
        expected = "its adapter_config.json beside them, or full weights"
        _refuse(directory / names[0], "the low-rank factors of an adapter", expected)
    if not names:
        raise BadInput(f"{directory.name}: got a directory without {SINGLE} or its index, expected weights")
    return {name: inside(directory, directory / name) for name in names}


def read_index(directory: Path) -> dict[str, str]:
    """Which file holds a tensor, by the index of a directory.

    Args:
        directory: the model's directory.

    Returns:
        tensor name -> file name; empty where all tensors are in one file or there is no index.

    Raises:
        BadInput: the index is damaged, or a file name in it is not the plain name of a safetensors file.
    """
    index = directory / INDEX
    if _there(directory / SINGLE) or not _there(index):
        return {}
    file = inside(directory, index)
    if file.stat().st_size > MAX_INDEX_BYTES:
        _refuse(index, f"{file.stat().st_size} bytes", f"at most {MAX_INDEX_BYTES}")
    content = parse_json(index, file.read_bytes())
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(index, "no weight_map", "an object from tensor names to files")
    if len(weight_map) > MAX_TENSORS:
        _refuse(index, f"{len(weight_map)} tensors", f"at most {MAX_TENSORS}")
    for name in weight_map.values():
        plain = isinstance(name, str) and not any(part in name for part in ("/", "\\", "..", ":", "\0"))
        if not plain or not name.endswith(".safetensors"):
            _refuse(index, f"the file name {name!r}", "the plain name of a .safetensors file in the same directory")
    return weight_map


def read_header(file: Path) -> list[Entry]:
    """The tensors of a safetensors file; every offset is checked against the file's size and the shape."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            _refuse(file, f"a header of {length} bytes in a file of {size}", "a safetensors file; it may be cut short")
        header = parse_json(file, handle.read(length))
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        _refuse(file, "a header that is no object of tensors", "a safetensors file")
    header.pop("__metadata__", None)
    return [_entry(file, name, value, 8 + length, size) for name, value in header.items()]


def _entry(file: Path, name: str, value: Any, data_start: int, size: int) -> Entry:
    try:
        code, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise BadInput(f"{file.name}: tensor {name!r} lacks dtype, shape or offsets; the header is damaged") from error
    numbers = [begin, end, *shape]
    if not isinstance(code, str) or any(type(n) is not int or n < 0 for n in numbers):
        _refuse(file, f"tensor {name!r} with {code!r}, {shape}, {begin}..{end}", "natural numbers")
    if not begin <= end <= size - data_start:
        _refuse(file, f"tensor {name!r} at bytes {begin}..{end}", f"offsets within {size - data_start} bytes of data")
    dtype = DTYPES.get(code, code.lower())
    wanted = math.prod(shape) * ITEM_BYTES[dtype] if dtype in ITEM_BYTES else end - begin
    if end - begin != wanted:
        _refuse(file, f"tensor {name!r} with {end - begin} bytes", f"{wanted} for {shape}")
    info = TensorInfo(name=name, shape=shape, dtype=dtype)
    return Entry(info=info, file=file, offset=data_start + begin, num_bytes=end - begin)


def parse_json(file: Path, data: bytes) -> Any:
    """JSON without duplicate keys, NaN or bottomless nesting; BadInput otherwise."""
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"{file.name}: got no valid JSON ({error}), expected a header or index; the file is damaged"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _there(file: Path) -> bool:
    return file.exists() or file.is_symlink()  # a link that leads nowhere is refused later, not overlooked


def _read_into(handle: BinaryIO, offset: int, out: Any) -> None:
    if isinstance(out, np.ndarray) and not out.size:
        return
    view = memoryview(out).cast("B") if not isinstance(out, memoryview) else out
    handle.seek(offset)
    done = 0
    while done < len(view):
        count = handle.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise BadInput(
                f"{Path(handle.name).name}: ended {len(view) - done} bytes early; it was cut short while being read"
            )
        done += count


def _refuse(file: Path, got: str, expected: str) -> NoReturn:
    raise BadInput(f"{file.name}: got {got}, expected {expected}")

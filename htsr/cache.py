"""Computed rows on disk, found by the content of their matrix: a repeated or interrupted scan computes what is missing.

The key of an entry is a hash of the stored bytes, the dtype and shape, which part of the tensor the matrix is, the
precision and the code that computed it; the name of the model or tensor is not in it. An entry is written in one step
and carries its own checksum: one that is damaged counts as missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from htsr.files import write_bytes
from htsr.matrix_row import cost, empty_row
from htsr.model.layers import LayerView
from htsr.model.parts import Part
from htsr.model.source import Source

Analyse = Callable[[LayerView], tuple[dict[str, Any], "np.ndarray | None"]]  # a view's row and eigenvalues
MIN_FLOPS = 1e7  # below, computing costs no more than reading an entry
DIGEST_BYTES = 32
UNCACHED = ("block", "role", "tensor", "rows", "cols", "dtype", "part_of", "lod", "lod_weight", "seconds")
IDENTITY = ("tensor", "block", "role", "reason", "part_of")  # of a view: where the matrix is, not what it is


def entry_key(source: Source, view: LayerView, **settings: Any) -> str:
    """The key of a view's row under these settings."""
    tensor = source.info(view.stored)
    geometry: dict[str, Any] = {k: v for k, v in vars(view).items() if k not in IDENTITY}
    geometry["pool"] = [_where(part) for part in view.pool]
    geometry["part"] = view.part and _where(view.part)
    what = [
        code_version(), source.is_delta, tensor.dtype, list(tensor.shape),
        source.tensor_sha256(view.stored), geometry, settings,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _where(part: Part) -> dict[str, Any]:
    """The rows and columns of a part, whatever its tensor is called."""
    return {"rows": asdict(part.rows), "cols": asdict(part.cols)}


def code_files() -> list[Path]:
    """The code that entries depend on: every numeric kernel, how matrices are read and how rows are made of them."""
    root = Path(__file__).parent
    read = [root / "model" / f"{name}.py" for name in ("fused", "parts", "reading", "reasons")]
    return sorted([*(root / "numerics").glob("*.py"), root / "matrix_row.py", *read])


@functools.cache
def code_version() -> str:
    """A hash of `code_files`."""
    digest = hashlib.sha256()
    for file in code_files():
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def with_cache(work: Analyse, source: Source, directory: Path, *, fresh: bool, **settings: Any) -> Analyse:
    """Make an analysis that reads the rows it finds in the cache, and stores there what it computes.

    Failed rows and differences to a base model are always computed.

    Args:
        work: computes the row and the eigenvalues of a view.
        source: the model that the views are of.
        directory: the cache.
        fresh: computes everything again and only stores.
        settings: what the numbers depend on beside the matrix and the code.

    Returns:
        The same function with a cache; rows that it did not compute have `cached` set.
    """
    cache = Cache(directory)

    def lookup(view: LayerView) -> tuple[dict[str, Any], np.ndarray | None]:
        if view.reason or source.base is not None or cost(view) < MIN_FLOPS:
            return work(view)
        start, key = time.perf_counter(), entry_key(source, view, **settings)
        if not fresh and (stored := cache.get(key)) is not None:
            known = {"seconds": time.perf_counter() - start, "cached": True}
            return {**empty_row(view, "ok", ""), **stored[0], **known}, stored[1]
        row, values = work(view)
        if values is not None:
            cache.put(key, {k: v for k, v in row.items() if k not in UNCACHED}, values)
        return row, values

    return lookup


class Cache:
    """Entries below a directory. Where the directory cannot be read or written, every entry is missing."""

    def __init__(self, directory: Path) -> None:
        self._root = directory / "spectra"

    def get(self, key: str) -> tuple[dict[str, Any], np.ndarray] | None:
        """The numbers of a row and its eigenvalues; None when there is no such entry or it is damaged."""
        try:
            content = self._file(key).read_bytes()
            digest, body = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
            if hashlib.sha256(key.encode() + body).digest() != digest:
                return None
            head, _, values = body.partition(b"\n")
            return dict(json.loads(head)), np.frombuffer(values, np.float64).copy()
        except (OSError, ValueError, TypeError):
            return None

    def put(self, key: str, numbers: dict[str, Any], eigenvalues: np.ndarray) -> None:
        """Store an entry; a reader sees all of it or nothing, and a directory that cannot be written to is no error."""
        body = (
            json.dumps(numbers, default=lambda value: value.item()).encode()
            + b"\n"
            + np.asarray(eigenvalues, np.float64).tobytes()
        )
        with contextlib.suppress(OSError):
            write_bytes(self._file(key), hashlib.sha256(key.encode() + body).digest() + body)

    def _file(self, key: str) -> Path:
        return self._root / key[:2] / key[2:]

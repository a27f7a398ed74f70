"""The exact weights of blocks that are frozen in a lossy format.

They stay in the checkpoint file until a block is drawn. What was trained goes to an overlay, exact bits in memory or
in a file a block, and is read from there ever after; so nothing is ever made from quantised values.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol
from weakref import finalize

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Read = Callable[[str], Tensor]
Exact = Mapping[str, Tensor]


class ExactWeights(Protocol):
    """Exact weights of a block by name inside the block; tensors on the host that the caller does not change, read from
    a file perhaps only when one is asked for."""

    def read(self, block: int) -> Exact: ...

    def keep(self, block: int, tensors: Mapping[str, Tensor]) -> None: ...

    def expect(self, blocks: Iterable[int]) -> None: ...


class Overlay:
    """Exact weights of what was trained: in memory, or one safetensors file a block below `directory`.

    The directory goes when nobody needs the overlay any more.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        if directory is not None:
            finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self._held: dict[int, Exact] = {}
        self._filed: set[int] = set()

    def __contains__(self, block: int) -> bool:
        return block in self._held or block in self._filed

    def put(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        plain = {name: _on_host(tensor) for name, tensor in tensors.items()}
        if self.directory is None:
            self._held[block] = plain
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        save_file(plain, self._path(block))
        self._filed.add(block)

    def get(self, block: int) -> Exact:
        return self._held[block] if block in self._held else load_file(self._path(block))

    def num_bytes(self) -> int:
        """Bytes held in memory."""
        return sum(t.numel() * t.element_size() for held in self._held.values() for t in held.values())

    def _path(self, block: int) -> Path:
        assert self.directory is not None
        return self.directory / f"block-{block}.safetensors"


class LazyWeights(Mapping[str, Tensor]):
    """A block's exact weights that are read from the checkpoint one at a time, each whenever it is asked for.

    place: name inside the block -> (name in the checkpoint, dtype that the model trains in).
    """

    def __init__(self, place: Mapping[str, tuple[str, torch.dtype]], read: Read) -> None:
        self._place, self._read = place, read

    def __getitem__(self, name: str) -> Tensor:
        stored, dtype = self._place[name]
        return self._read(stored).to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


class FileExactWeights:
    """Exact weights in a checkpoint that is read a tensor at a time, under an overlay.

    places: for each block, name inside the block -> (name in the checkpoint, dtype that the model trains in).
    """

    def __init__(self, read: Read, places: Sequence[Mapping[str, tuple[str, torch.dtype]]], overlay: Overlay) -> None:
        self._read, self._places, self.overlay = read, places, overlay
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="owlore-masters")
        self._coming: dict[int, Future[Exact]] = {}

    def read(self, block: int) -> Exact:
        coming = self._coming.pop(block, None)
        if block in self.overlay:
            return self.overlay.get(block)
        return coming.result() if coming is not None else self._lazy(block)

    def keep(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        self.overlay.put(block, tensors)

    def expect(self, blocks: Iterable[int]) -> None:
        """Begin to read these blocks, which are drawn next; what was expected before and not read is dropped."""
        wanted = [block for block in blocks if block not in self.overlay]
        for block in set(self._coming) - set(wanted):
            self._coming.pop(block).cancel()
        for block in wanted:
            if block not in self._coming:
                self._coming[block] = self._thread.submit(dict, self._lazy(block))

    def _lazy(self, block: int) -> LazyWeights:
        return LazyWeights(self._places[block], self._read)


def _on_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype)
    return host.copy_(tensor)

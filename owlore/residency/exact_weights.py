"""The exact weights of blocks that are frozen in a lossy format.

They stay in the checkpoint file until a block is drawn. What was trained goes to an overlay, exact bits in memory or in
one file a block, and is read from there afterwards; so nothing is ever computed from quantised values.
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

Read = Callable[[str], Tensor]  # a name in the checkpoint -> its tensor
Tensors = Mapping[str, Tensor]  # name inside the block -> tensor
Sources = Mapping[str, tuple[str, torch.dtype]]  # name inside the block -> (name in the checkpoint, training dtype)


class ExactWeights(Protocol):
    """Exact weights of blocks, on the host."""

    def read(self, block: int) -> Tensors:
        """Tensors that the caller does not change; each may be read from a file only when it is looked up."""

    def write(self, block: int, tensors: Tensors) -> None:
        """Replace the weights of a block by copies of `tensors`."""

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Begin to read blocks that will be asked for next."""


class Overlay:
    """Exact weights of what was trained.

    Args:
        directory: where each block is one safetensors file, removed when the overlay is no longer referenced; None for
            memory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        if directory is not None:
            finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self._in_memory: dict[int, Tensors] = {}
        self._in_files: set[int] = set()

    def __contains__(self, block: int) -> bool:
        return block in self._in_memory or block in self._in_files

    def put(self, block: int, tensors: Tensors) -> None:
        """Keep copies of a block's tensors."""
        copies = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t) for name, t in tensors.items()}
        if self.directory is None:
            self._in_memory[block] = copies
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        save_file(copies, self._path(block))
        self._in_files.add(block)

    def get(self, block: int) -> Tensors:
        """The tensors of a block that was put."""
        return self._in_memory[block] if block in self._in_memory else load_file(self._path(block))

    def num_bytes(self) -> int:
        """Bytes held in memory."""
        return sum(t.numel() * t.element_size() for held in self._in_memory.values() for t in held.values())

    def _path(self, block: int) -> Path:
        assert self.directory is not None
        return self.directory / f"block-{block}.safetensors"


class LazyWeights(Mapping[str, Tensor]):
    """A block's exact weights; each is read from the checkpoint whenever it is looked up."""

    def __init__(self, sources: Sources, read: Read) -> None:
        self._sources, self._read = sources, read

    def __getitem__(self, name: str) -> Tensor:
        stored, dtype = self._sources[name]
        return self._read(stored).to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


class FileExactWeights:
    """Exact weights in a checkpoint that is read a tensor at a time, under an overlay.

    Args:
        read: reads a tensor of the checkpoint.
        sources: for each block where its tensors are.
        overlay: has the blocks that were trained.
    """

    def __init__(self, read: Read, sources: Sequence[Sources], overlay: Overlay) -> None:
        self._read, self._sources, self.overlay = read, sources, overlay
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="owlore-exact-weights")
        self._pending: dict[int, Future[Tensors]] = {}

    def read(self, block: int) -> Tensors:
        pending = self._pending.pop(block, None)
        if block in self.overlay:
            return self.overlay.get(block)
        return pending.result() if pending is not None else self._lazy(block)

    def write(self, block: int, tensors: Tensors) -> None:
        self.overlay.put(block, tensors)

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Begin to read these blocks; blocks of an earlier call that were not read are dropped."""
        wanted = [block for block in blocks if block not in self.overlay]
        for block in set(self._pending) - set(wanted):
            self._pending.pop(block).cancel()
        for block in wanted:
            if block not in self._pending:
                self._pending[block] = self._thread.submit(dict, self._lazy(block))

    def _lazy(self, block: int) -> LazyWeights:
        return LazyWeights(self._sources[block], self._read)

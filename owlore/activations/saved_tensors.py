"""An arena for what autograd saves of frozen blocks on the CPU; every step uses its buffers again.

A frozen block that backward goes through keeps its activations until then. Left where the forward allocated them, they
lie between its temporary tensors, and the C heap is left with holes that are too small for the next tensor (see
`malloc_trim`): memory grows until what is free is given back, and pages that are given back cost a fault when the next
step needs them, 0.3 s of 8.5 s in a step of SmolLM2-135M. So each saved storage is copied once to a buffer as large as
a block's activations, and the buffer is free again after the block's backward. Bits and strides are those of the
original. A trained block's activations stay where they are, because its gradients take their memory next.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from owlore.patches import PatchStack

MIN_BYTES = 1 << 9  # smaller storages take no more than the graph's nodes do, and are not copied
ALIGNMENT = 64  # bytes; that of torch's own memory, so that kernels take the same code path


@contextmanager
def saved_tensors_in_arena(blocks: Sequence[nn.Module], *, enabled: bool) -> Iterator[SavedTensorArena]:
    """While this lasts, activations that are saved for backward through frozen blocks are copied to an arena."""
    arena = SavedTensorArena(blocks)
    with PatchStack() as patches:
        for block in blocks if enabled else ():
            patches.replace_forward(block, arena.wrap(block, block.forward))
        yield arena


class SavedTensorArena:
    """Buffers for the saved activations of as many blocks as were ever saved at the same time.

    Attributes:
        block_bytes: the most bytes that a block was seen to save.
        buffers: each has room for the activations of one block.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.block_bytes = 0
        self.buffers: list[_Buffer] = []
        self._weights = frozenset(
            _address(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())
        )

    def wrap(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of `block`; what it saves is copied to a buffer if the block is frozen at the call."""

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() or any(parameter.requires_grad for parameter in block.parameters()):
                return forward(*args, **kwargs)
            # The first argument is the hidden state, made by the block below; others (masks, rotations) are shared.
            shared = {_address(leaf) for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, Tensor)}
            saved = _SavedForward(self._free_buffer(), self._weights | shared)
            with saved_tensors_hooks(saved.pack, _unpack):
                out = forward(*args, **kwargs)
            self.block_bytes = max(self.block_bytes, saved.needed)
            return out

        return run

    def _free_buffer(self) -> _Buffer | None:
        """A free buffer of `block_bytes`; None before it is known what a block saves."""
        if not self.block_bytes:
            return None
        buffer = next((buffer for buffer in self.buffers if not buffer.in_use), None)
        if buffer is None:
            buffer = _Buffer()
            self.buffers.append(buffer)
        if len(buffer.memory) < self.block_bytes:
            buffer.allocate(self.block_bytes)
        return buffer

    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(len(buffer.memory) for buffer in self.buffers)


class _Buffer:
    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.saved: weakref.ref[_SavedForward] | None = None

    @property
    def in_use(self) -> bool:
        """Whether a graph still holds something that was copied here."""
        return self.saved is not None and self.saved() is not None

    def allocate(self, num_bytes: int) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)  # frees the old one first
        self.memory = torch.empty(num_bytes, dtype=torch.uint8)


class _SavedForward:
    """What one forward of one block saved; lives as long as the graph holds a part of it.

    Args:
        buffer: where storages are copied; None to count bytes only.
        excluded: addresses of storages that are not copied: weights, and what several blocks share.

    Attributes:
        needed: bytes that a buffer needs for all storages.
    """

    def __init__(self, buffer: _Buffer | None, excluded: frozenset[int] | set[int]) -> None:
        self.buffer, self.excluded, self.needed = buffer, excluded, 0
        # By address: a reference to the storage (once it is freed, the address is another's), its version at the copy
        # (another one tells that it was written to since), and the offset of the copy.
        self._copies: dict[int, tuple[weakref.ref[Any], int, int | None]] = {}
        if buffer is not None:
            buffer.saved = weakref.ref(self)

    def pack(self, tensor: Tensor) -> Any:
        """The tensor itself, or its copy in the buffer with the same strides."""
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            return tensor
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size < MIN_BYTES or address in self.excluded:
            return tensor
        copied, version, offset = self._copies.get(address, (lambda: None, 0, None))
        if copied() is None or version != tensor._version:
            offset = self._copy(storage, size)
            self._copies[address] = (weakref.ref(storage), tensor._version, offset)
        if offset is None or self.buffer is None:
            return tensor
        item, memory = tensor.element_size(), self.buffer.memory
        typed = memory[: len(memory) // item * item].view(tensor.dtype)
        return _Kept(self, typed.as_strided(tensor.shape, tensor.stride(), offset // item + tensor.storage_offset()))

    def _copy(self, storage: Any, size: int) -> int | None:
        """Copy a storage and return the offset of the copy; None where the buffer is too small for it."""
        offset, self.needed = self.needed, self.needed + -(-size // ALIGNMENT) * ALIGNMENT
        if self.buffer is None or self.needed > len(self.buffer.memory):
            return None
        with torch.no_grad():
            self.buffer.memory[offset : offset + size].copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
        return offset


@dataclass(frozen=True)
class _Kept:
    saved: _SavedForward  # referenced, so that the buffer counts as in use
    tensor: Tensor


def _unpack(kept: Any) -> Tensor:
    tensor: Tensor = kept.tensor if isinstance(kept, _Kept) else kept
    return tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

"""What autograd keeps of a frozen block lies on arena that every step uses again, on the CPU.

A frozen block that backward passes keeps its activations until backward comes by. Left where the forward made them,
they lie between its passing tensors, and the C heap fills with holes that are too small for the next tensor (`heap`):
memory grows until what is free is given back, and pages that are given back cost a fault when the next step wants them,
0.3 s of 8.5 s in a step of SmolLM2-135M. So each is copied, once a storage, to a buffer as large as a block's
activations, and its buffer is free again when the block's backward is through. Bits and strides are those of the
original. A trained block's activations stay where they are: what comes in their place, gradients, needs their room.
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

LEAST = 1 << 9  # bytes; what is smaller is no more than what nodes of the graph take
ALIGNED = 64  # bytes; where torch's own memory begins, so that kernels take the same way


@contextmanager
def saved_tensor_arena(blocks: Sequence[nn.Module], *, enabled: bool) -> Iterator[SavedTensorArena]:
    """While this lasts, activations kept for backward through frozen blocks are put on arena."""
    arena = SavedTensorArena(blocks)
    with PatchStack() as patches:
        for block in blocks if enabled else ():
            patches.replace_forward(block, arena.around(block, block.forward))
        yield arena


class SavedTensorArena:
    """Memory for the kept activations of as many blocks as were ever kept at once."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.size = 0  # bytes that a block was seen to keep at most
        self.all: list[_Buffer] = []
        self._own = frozenset(
            _address(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())
        )

    def around(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of `block`, with what it saves put on a buffer if the block is frozen then."""

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() or any(parameter.requires_grad for parameter in block.parameters()):
                return forward(*args, **kwargs)
            # The first argument is the hidden state, made by the block below; others (masks, rotations) are shared.
            shared = {_address(leaf) for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, Tensor)}
            user = _User(self._free(), self._own | shared)
            with saved_tensors_hooks(user.pack, _unpack):
                out = forward(*args, **kwargs)
            self.size = max(self.size, user.needed)
            return out

        return run

    def _free(self) -> _Buffer | None:
        """A buffer that nobody uses, of the present size; None before it is known what a block keeps."""
        if not self.size:
            return None
        buffer = next((buffer for buffer in self.all if not buffer.is_used), None)
        if buffer is None:
            buffer = _Buffer()
            self.all.append(buffer)
        if buffer.size < self.size:
            buffer.renew(self.size)
        return buffer

    def num_bytes(self) -> int:
        return sum(buffer.size for buffer in self.all)


class _Buffer:
    def __init__(self) -> None:
        self.room = torch.empty(0, dtype=torch.uint8)
        self.user: weakref.ref[_User] | None = None

    @property
    def is_used(self) -> bool:
        """Does a graph still hold something that lies here?"""
        return self.user is not None and self.user() is not None

    @property
    def size(self) -> int:
        return len(self.room)

    def renew(self, size: int) -> None:
        self.room = torch.empty(0, dtype=torch.uint8)  # the old one goes first
        self.room = torch.empty(size, dtype=torch.uint8)


class _User:
    """One forward of one block: lives as long as something that it saved does."""

    def __init__(self, buffer: _Buffer | None, leave: frozenset[int] | set[int]) -> None:
        self.buffer, self.leave, self.needed = buffer, leave, 0
        # By address: the storage, if it still lives (else the address is another's now), its version then (else it was
        # written to after it was copied), and where the copy begins.
        self.copies: dict[int, tuple[weakref.ref[Any], int, int | None]] = {}
        if buffer is not None:
            buffer.user = weakref.ref(self)

    def pack(self, tensor: Tensor) -> Any:
        """The tensor itself, or a copy with its strides on the buffer."""
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            return tensor
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size < LEAST or address in self.leave:
            return tensor
        known, version, begin = self.copies.get(address, (lambda: None, 0, None))
        if known() is None or version != tensor._version:
            begin = self._copied(storage, size)
            self.copies[address] = (weakref.ref(storage), tensor._version, begin)
        if begin is None or self.buffer is None:
            return tensor
        item = tensor.element_size()
        room = self.buffer.room[: self.buffer.size // item * item].view(tensor.dtype)
        return _Kept(self, room.as_strided(tensor.shape, tensor.stride(), begin // item + tensor.storage_offset()))

    def _copied(self, storage: Any, size: int) -> int | None:
        """Where the copy of the storage begins; None where the buffer has no room for it."""
        begin, self.needed = self.needed, self.needed + -(-size // ALIGNED) * ALIGNED
        if self.buffer is None or self.needed > self.buffer.size:
            return None
        with torch.no_grad():
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.buffer.room[begin : begin + size].copy_(whole)
        return begin


@dataclass(frozen=True)
class _Kept:
    user: _User  # held, so that the buffer counts as used
    tensor: Tensor


def _unpack(kept: Any) -> Tensor:
    tensor: Tensor = kept.tensor if isinstance(kept, _Kept) else kept
    return tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

"""The blocks of a model as a chain of functions that can be called one at a time.

A model's own forward embeds, makes masks and positions, calls its blocks one after another and ends with a norm. To
walk the blocks in another order that forward is run twice with stand-ins for the blocks: once to *capture* what enters
the first block and what arguments each gets, once to *inject* what the last one gave. A model whose blocks are no
chain (one reads what another left elsewhere) would be computed wrongly, so `check` compares both ways first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from htsr.errors import BadInput
from owlore.patches import PatchStack


@dataclass(frozen=True)
class Arguments:
    """What a block is called with beside the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model call up to its blocks: the hidden state that enters them and every block's arguments."""

    hidden: Tensor
    arguments: tuple[Arguments, ...]


class BlockChain:
    """Owns the forwards of the blocks. `visit(block)` holds the block's weights wherever a block is run."""

    def __init__(
        self, blocks: Sequence[nn.Module], visit: Callable[[int], Any], patches: PatchStack | None = None
    ) -> None:
        self._blocks, self._visit = tuple(blocks), visit
        self._forwards = [block.forward for block in blocks]
        self._tuple = [False] * len(blocks)
        self._stand_in: Callable[[int, Tensor, Arguments], Tensor] | None = None
        patches = PatchStack() if patches is None else patches
        for index, block in enumerate(blocks):
            patches.replace_forward(block, self._wrapped(index, block.forward))

    def __len__(self) -> int:
        return len(self._blocks)

    def _wrapped(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, arguments = _split(args, kwargs)
            if self._stand_in is not None:
                out = self._stand_in(index, hidden, arguments)
                return (out,) if self._tuple[index] else out
            with self._visit(index):
                result = forward(*args, **kwargs)
            self._tuple[index] = isinstance(result, tuple | list)
            return result

        return run

    def call(self, index: int, hidden: Tensor, arguments: Arguments) -> Tensor:
        """Run one block; its weights are the caller's concern."""
        result = self._forwards[index](hidden, *arguments.args, **arguments.kwargs)
        out: Tensor = result[0] if isinstance(result, tuple | list) else result
        return out

    def capture(self, forward: Callable[[], Any], entered: Callable[[], None] = lambda: None) -> Entry:
        """What the model's `forward` gives its blocks. entered: called when the first block would run."""
        first: list[Tensor] = []
        given: list[Arguments] = []

        def record(index: int, hidden: Tensor, arguments: Arguments) -> Tensor:
            if index == 0:
                entered()
                first.append(hidden)
            given.append(arguments)
            return hidden

        with self._standing_in(record):
            forward()
        if len(given) != len(self._blocks):
            raise BadInput(f"the model called {len(given)} of its {len(self._blocks)} blocks; it cannot be streamed")
        return Entry(hidden=first[0], arguments=tuple(given))

    def inject(self, hidden: Tensor, forward: Callable[[], Any], left: Callable[[], None] = lambda: None) -> Any:
        """The result of the model's `forward` when its last block gives `hidden`. left: called as it does."""

        def give(index: int, passing: Tensor, arguments: Arguments) -> Tensor:
            if index < len(self._blocks) - 1:
                return passing
            left()
            return hidden

        with self._standing_in(give):
            return forward()

    @contextmanager
    def _standing_in(self, function: Callable[[int, Tensor, Arguments], Tensor]) -> Iterator[None]:
        self._stand_in = function
        try:
            yield
        finally:
            self._stand_in = None

    @torch.no_grad()
    def check(self, forward: Callable[[], Tensor]) -> None:
        """Is the model's own forward the chain of its blocks? `forward` is tried on a few tokens, without dropout.

        Raises: BadInput when it is not.
        """
        own = forward()
        entry = self.capture(forward)
        hidden = entry.hidden
        for index, arguments in enumerate(entry.arguments):
            with self._visit(index):
                hidden = self.call(index, hidden, arguments)
        if not torch.equal(self.inject(hidden, forward), own):
            raise BadInput("this model's blocks are not a plain chain; train it with --residency device --frozen bf16")


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    if args:
        return args[0], Arguments(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Arguments((), rest)

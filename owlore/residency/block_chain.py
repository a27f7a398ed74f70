"""The blocks of a model as a chain of functions that can be called one at a time.

A model's own forward embeds, makes masks and positions, calls its blocks one after another and ends with a norm. To
call the blocks in another order, that forward is run twice with replacements for the blocks: once to *capture* what
enters the first block and what arguments each gets, once to *inject* what the last one gave. A model whose blocks are
no chain (one reads what another stored elsewhere) would be computed wrongly, so `check` compares both ways first.
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
class BlockArguments:
    """The arguments of a block beside the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BlockInputs:
    """What one model call gives its blocks: the hidden state that enters the first and every block's arguments."""

    hidden: Tensor
    arguments: tuple[BlockArguments, ...]


class BlockChain:
    """Replaces the forwards of the blocks.

    Args:
        blocks: the blocks, from the lowest up.
        visit: gives a context in which a block's weights are on the device; entered wherever the model calls a block.
        patches: the stack on which the forwards are replaced.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], visit: Callable[[int], Any], patches: PatchStack | None = None
    ) -> None:
        self._visit = visit
        self._forwards = [block.forward for block in blocks]
        self._returns_tuple = [False] * len(blocks)
        self._replacement: Callable[[int, Tensor, BlockArguments], Tensor] | None = None
        patches = PatchStack() if patches is None else patches
        for index, block in enumerate(blocks):
            patches.replace_forward(block, self._wrapped(index, block.forward))

    def __len__(self) -> int:
        return len(self._forwards)

    def _wrapped(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, arguments = _split(args, kwargs)
            if self._replacement is not None:
                out = self._replacement(index, hidden, arguments)
                return (out,) if self._returns_tuple[index] else out
            with self._visit(index):
                result = forward(*args, **kwargs)
            self._returns_tuple[index] = isinstance(result, tuple | list)
            return result

        return run

    def call(self, index: int, hidden: Tensor, arguments: BlockArguments) -> Tensor:
        """Run one block, which the caller visits, and return the hidden state that it gives."""
        result = self._forwards[index](hidden, *arguments.args, **arguments.kwargs)
        out: Tensor = result[0] if isinstance(result, tuple | list) else result
        return out

    def capture(self, forward: Callable[[], Any], on_first: Callable[[], None] = lambda: None) -> BlockInputs:
        """What the model's forward gives its blocks, none of which is run.

        Args:
            forward: runs the model.
            on_first: called when the first block would run.

        Raises:
            BadInput: the model does not call each of its blocks once.
        """
        first: list[Tensor] = []
        given: list[BlockArguments] = []

        def record(index: int, hidden: Tensor, arguments: BlockArguments) -> Tensor:
            if index == 0:
                on_first()
                first.append(hidden)
            given.append(arguments)
            return hidden

        with self._replaced(record):
            forward()
        if len(given) != len(self):
            raise BadInput(f"the model called {len(given)} of its {len(self)} blocks; it cannot be streamed")
        return BlockInputs(hidden=first[0], arguments=tuple(given))

    def inject(self, hidden: Tensor, forward: Callable[[], Any], on_last: Callable[[], None] = lambda: None) -> Any:
        """The result of the model's forward when its last block gives `hidden`; no block is run.

        Args:
            hidden: the hidden state after the last block.
            forward: runs the model.
            on_last: called when the last block would return.
        """

        def give(index: int, passing: Tensor, arguments: BlockArguments) -> Tensor:
            if index < len(self) - 1:
                return passing
            on_last()
            return hidden

        with self._replaced(give):
            return forward()

    @contextmanager
    def _replaced(self, function: Callable[[int, Tensor, BlockArguments], Tensor]) -> Iterator[None]:
        self._replacement = function
        try:
            yield
        finally:
            self._replacement = None

    @torch.no_grad()
    def check(self, forward: Callable[[], Tensor]) -> None:
        """Compare the model's own forward with the chain of its blocks.

        Args:
            forward: runs the model on a few tokens, without dropout.

        Raises:
            BadInput: they differ.
        """
        expected = forward()
        inputs = self.capture(forward)
        hidden = inputs.hidden
        for index, arguments in enumerate(inputs.arguments):
            with self._visit(index):
                hidden = self.call(index, hidden, arguments)
        if not torch.equal(self.inject(hidden, forward), expected):
            raise BadInput("this model's blocks are not a plain chain; train it with --residency device --frozen bf16")


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockArguments]:
    if args:
        return args[0], BlockArguments(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockArguments((), rest)

"""One stack of everything that a run puts onto a model: replaced forwards, hooks, listeners.

Whatever replaces a `forward` or sets a hook registers it here; closing the stack takes all of it off, the last first,
whatever failed and when.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Undo = Callable[[], None]


class PatchStack:
    """Changes to modules that are taken off in reverse order; also a context manager."""

    def __init__(self) -> None:
        self._undos: dict[int, Undo] = {}  # by number, in the order of registration
        self._count = 0

    def __len__(self) -> int:
        return len(self._undos)

    def __enter__(self) -> PatchStack:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add(self, undo: Undo) -> Undo:
        """Register what takes a change off.

        Args:
            undo: called once, when the stack is closed or by the returned function.

        Returns:
            A function that takes this one change off before the others; calling it again does nothing.
        """
        number = self._count = self._count + 1
        self._undos[number] = undo

        def take_off() -> None:
            if self._undos.pop(number, None) is not None:
                undo()

        return take_off

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> Undo:
        """Let `module` compute `forward` until it is taken off.

        Args:
            module: its own forward comes back, be it that of its class or one that was set on the instance.
            forward: called with the arguments of the module's forward.

        Returns:
            A function that takes it off; several on one module have to come off last first.
        """
        before = vars(module).get("forward")

        def give_back() -> None:
            if before is None:
                del module.forward  # uncovers the class's method
            else:
                module.forward = before

        module.forward = forward
        return self.add(give_back)

    def close(self) -> None:
        """Take everything off, the last first. All of it is tried; the first error is raised at the end."""
        failed: BaseException | None = None
        while self._undos:
            _, undo = self._undos.popitem()
            try:
                undo()
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed

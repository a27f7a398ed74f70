"""One stack of all changes that a run makes to a model's modules: replaced forwards, hooks, listeners.

Code that replaces a `forward` or sets a hook registers that here. Closing the stack undoes everything, the last change
first, also after an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Undo = Callable[[], None]


class PatchStack:
    """Changes to modules that are undone in reverse order; a context manager that closes itself."""

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
        """Register the undoing of a change.

        Args:
            undo: called once, when the stack is closed or by the returned function.

        Returns:
            A function that undoes this one change before the others; calling it again does nothing.
        """
        number = self._count = self._count + 1
        self._undos[number] = undo

        def undo_once() -> None:
            if self._undos.pop(number, None) is not None:
                undo()

        return undo_once

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> Undo:
        """Let `module` compute `forward` until that is undone.

        Args:
            module: undoing restores its present forward, that of its class or one that was set on the instance.
            forward: called with the arguments of the module's forward.

        Returns:
            A function that undoes it; several replacements on one module have to be undone last first.
        """
        before = vars(module).get("forward")

        def restore() -> None:
            if before is None:
                del module.forward  # uncovers the class's method
            else:
                module.forward = before

        module.forward = forward
        return self.add(restore)

    def close(self) -> None:
        """Undo everything, the last change first; after an error the rest is undone and the first error raised."""
        failed: BaseException | None = None
        while self._undos:
            _, undo = self._undos.popitem()
            try:
                undo()
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed

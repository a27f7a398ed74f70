"""Per-block `torch.compile`: one compiled function for all blocks of a class.

A whole model is compiled anew for every draw until the limit is reached; a block's code sees only whether its own
parameters and its input need gradients. The parameters go in as arguments of the graph, so blocks share it, and sizes
are symbols, so rows of another length do too. What is left are four cases: below the lowest trained block, that block
itself, a frozen one above it and a trained one above it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from htsr.errors import UsageError
from owlore.patches import PatchStack


class Compiled:
    """Replaces the forward of every block by a compiled one; compiling happens at the first calls, and takes minutes
    with C++ code. Without gradients (evaluation, generation) the blocks run as they are, unless `always`: where blocks
    are streamed every step goes through them without gradients first.

    Raises: UsageError on a CPU without a C++ compiler.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        enabled: bool,
        device: torch.device,
        backend: Any = "inductor",
        always: bool = False,
        patches: PatchStack | None = None,
    ) -> None:
        if enabled and backend == "inductor" and device.type == "cpu" and not cpp_compiler():
            raise UsageError("got --compile without a C++ compiler, expected one on a CPU; install g++")
        functions: dict[type[nn.Module], Callable[..., Any]] = {}
        self.patches = PatchStack() if patches is None else patches
        for block in blocks if enabled else ():
            kind, own = type(block), vars(block).get("forward")
            if own is None and kind not in functions:
                functions[kind] = _compiled(kind.forward, backend, always)
            # What somebody set on this block in place of its class's forward is compiled for it alone.
            function = partial(functions[kind], block) if own is None else _compiled(own, backend, always)
            self.patches.replace_forward(block, function)


def _compiled(forward: Callable[..., Any], backend: Any, always: bool) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=True, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        return (compiled if always or torch.is_grad_enabled() else forward)(*args, **kwargs)

    return run


def cpp_compiler() -> str | None:
    """The C++ compiler that torch will call, None where there is none."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)

"""Per-block `torch.compile`: one compiled function for all blocks of a class.

A whole model would be compiled again for every draw. A block's code depends only on whether its own parameters and its
input need gradients. The parameters are arguments of the graph, so blocks share it, and sizes are symbols, so rows of
another length do too. Four cases are left: a block below the lowest trained one, that block itself, a frozen one above
it and a trained one above it.
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


def compile_blocks(
    blocks: Sequence[nn.Module],
    *,
    device: torch.device,
    patches: PatchStack,
    backend: Any = "inductor",
    always: bool = False,
) -> None:
    """Replace the forward of every block by a compiled one, which is compiled at its first calls.

    Compiling C++ code takes minutes.

    Args:
        blocks: the blocks.
        device: where they compute.
        patches: the stack on which the forwards are replaced.
        backend: of `torch.compile`.
        always: whether the blocks are compiled without gradients too, which streamed blocks need: their forward has
            none. Otherwise evaluation and generation run the plain forwards.

    Raises:
        UsageError: there is no C++ compiler and the device is a CPU.
    """
    if backend == "inductor" and device.type == "cpu" and not cpp_compiler():
        raise UsageError("got --compile without a C++ compiler, expected one on a CPU; install g++")
    functions: dict[type[nn.Module], Callable[..., Any]] = {}
    for block in blocks:
        kind, instance_forward = type(block), vars(block).get("forward")
        if instance_forward is not None:  # set on this block in place of its class's forward: compiled for it alone
            patches.replace_forward(block, _compiled(instance_forward, backend, always))
            continue
        if kind not in functions:
            functions[kind] = _compiled(kind.forward, backend, always)
        patches.replace_forward(block, partial(functions[kind], block))


def _compiled(forward: Callable[..., Any], backend: Any, always: bool) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=True, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        return (compiled if always or torch.is_grad_enabled() else forward)(*args, **kwargs)

    return run


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that torch will call, None where there is none."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)

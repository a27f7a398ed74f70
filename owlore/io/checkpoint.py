"""Atomic checkpoints: `checkpoints/step-NNNNNN/` with safetensors and JSON, and a file COMPLETE written last.

A checkpoint has everything that differs from the model at the start: the weights of every parameter that was ever
trained, the optimizer's tensors, and counters. Everything else (draws, data order, learning rate, random numbers) is a
function of the configuration and the step. The checkpoint of the best evaluation (--keep-best) has the weights of every
parameter that may be trained, so that the run can return to it after further parameters were trained.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from htsr.errors import BadInput, NotFound
from owlore.io.safetensors_writer import aligned, outline, pieces, write_tensors

COMPLETE = "COMPLETE"
SCHEMA = "owlore-checkpoint/1"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Contents of a checkpoint directory.

    Attributes:
        step: Number of optimizer steps done.
        weights: Weights by parameter name.
        optimizer: The optimizer's tensors by name.
        state: Counters and settings, as JSON.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save(
    root: Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    exact: Callable[[str], Tensor] | None = None,
) -> Path:
    """Write a checkpoint that is either complete or not there; an older one of that step is replaced.

    Args:
        root: Directory of the checkpoints.
        step: Number of optimizer steps done.
        weights: Weights by parameter name.
        optimizer: The optimizer's tensors by name.
        state: Counters and settings, as JSON.
        exact: Gives the value of a weight by name; with it the tensors in `weights` only need the dtype and shape.

    Returns:
        The directory `root/step-NNNNNN`.
    """
    final = path_of(root, step)
    partial = root / f".tmp-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    value = weights.__getitem__ if exact is None else exact
    outlines = aligned({name: outline(tensor) for name, tensor in weights.items()})
    write_tensors(partial / "weights.safetensors", outlines, lambda name: pieces(value(name)))
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in optimizer.items()}
    save_file(tensors, partial / "optimizer.safetensors")
    document = {"schema": SCHEMA, "step": step, **state}
    (partial / "state.json").write_text(json.dumps(document, indent=1, allow_nan=False))
    for file in partial.iterdir():
        _sync(file)
    (partial / COMPLETE).touch()
    _sync(partial / COMPLETE)
    _sync(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(root)
    return final


def complete(root: Path) -> list[Path]:
    """Directories of complete checkpoints in `root`, the oldest first."""
    found = [path for path in root.glob("step-*") if (path / COMPLETE).is_file()]
    return sorted(found, key=step_of)


def path_of(root: Path, step: int) -> Path:
    """The directory of the checkpoint of a step."""
    return root / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """Number of optimizer steps done at the checkpoint in this directory."""
    return int(path.name.removeprefix("step-"))


def prune(root: Path, keep: int, *, best: int | None = None) -> None:
    """Delete checkpoints except the newest `keep` and that of step `best`, and those that were not completed."""
    for path in complete(root)[:-keep]:
        if best is not None and path == path_of(root, best):
            continue
        (path / COMPLETE).unlink()  # an interrupted deletion does not leave a checkpoint
        shutil.rmtree(path)
    for path in root.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        NotFound: There is no such directory.
        BadInput: The checkpoint is unfinished or damaged.
    """
    if not path.is_dir():
        raise NotFound(f"no checkpoint at {path}")
    if not (path / COMPLETE).is_file():
        raise BadInput(f"{path} is not a complete checkpoint (no file {COMPLETE}): resume from another one")
    try:
        state = json.loads((path / "state.json").read_text())
        weights = load_file(path / "weights.safetensors")
        optimizer = load_file(path / "optimizer.safetensors")
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read ({error}): resume from another checkpoint") from error
    if state.get("schema") != SCHEMA:
        raise BadInput(f"{path} has schema {state.get('schema')!r}, expected {SCHEMA!r}")
    return Checkpoint(step=state["step"], weights=weights, optimizer=optimizer, state=state)


def _sync(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

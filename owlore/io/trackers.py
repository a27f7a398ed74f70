"""Forwarding metrics rows to tensorboard or wandb (--log-to); neither is imported otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from htsr.errors import UsageError

Row = dict[str, Any]


class Tracker(Protocol):
    """Receives every metrics row when it is written."""

    def log(self, row: Row) -> None:
        """Record the numbers of a row."""

    def close(self) -> None:
        """Finish the record."""


class Tensorboard:
    """Event files in `tensorboard/` of the run; rows after the step from which a run is resumed are hidden."""

    def __init__(self, directory: Path, settings: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)
        self._writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()), step)

    def log(self, row: Row) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A wandb run in `wandb/` of the run, offline unless the environment variable WANDB_MODE has another mode."""

    def __init__(self, directory: Path, settings: dict[str, Any], step: int) -> None:
        import wandb

        self._run = wandb.init(
            dir=str(directory), name=directory.name, config=settings, mode=os.environ.get("WANDB_MODE", "offline")
        )

    def log(self, row: Row) -> None:
        self._run.log(numbers(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {"tensorboard": Tensorboard, "wandb": Wandb}


def check_trackers(names: Sequence[str]) -> None:
    """Check that the trackers are installed.

    Raises:
        UsageError: One of them is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise UsageError(f"--log-to {name}: it is not installed; python -m pip install 'htsr-owlore[track]'")


@contextmanager
def open_trackers(
    names: Sequence[str], directory: Path, settings: dict[str, Any], *, step: int
) -> Iterator[list[Tracker]]:
    """Open trackers, which are closed at the end of the context.

    Args:
        names: Keys of `TRACKERS`.
        directory: Directory of the run.
        settings: Settings of the run, which are recorded too.
        step: Step from which the run is resumed, 0 for a new run.
    """
    with ExitStack() as stack:
        opened: list[Tracker] = []
        for name in names:
            opened.append(TRACKERS[name](directory, settings, step))
            stack.callback(opened[-1].close)
        yield opened


def numbers(row: Row) -> dict[str, float]:
    """The numbers of a row by `split/key`, such as `train/loss`, without its step."""
    return {
        f"{row['split']}/{name}": float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }

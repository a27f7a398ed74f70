"""The directory of a run: found, refused where it holds something else, and compared with what a resume asks for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htsr.errors import NotFound, UsageError
from htsr.files import check_output_directory
from owlore.config import TrainConfig
from owlore.io import checkpoint

# A continued run may be longer, look more often, keep more or move; anything else would make it another run. Model,
# data and table are compared by content, not by name.
MAY_CHANGE = frozenset({
    "steps", "epochs", "out", "eval_every", "save_every", "keep", "preset", "device", "checkpointing",
    "model", "data", "table", "log_to", "residency", "resident_share", "offload_activations",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """A run directory.

    Attributes:
        path: the directory.
        saved: the checkpoint that the run goes on from; None for a new run.
        existed: whether the directory was there before the run.
    """

    path: Path
    saved: checkpoint.Checkpoint | None
    existed: bool

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are written."""
        return self.path / "checkpoints"


def find_directory(config: TrainConfig, model_slug: str) -> RunDirectory:
    """Find where the run is written.

    Args:
        config: the settings.
        model_slug: the model's name as part of a path.

    Raises:
        UsageError: `--out` already holds a run (a complete checkpoint) and `--resume` was not given, or holds other
            files.
        NotFound: there is nothing to resume.
    """
    named = Path(config.resume) if isinstance(config.resume, str) else None
    if named is not None and named.parent.name == "checkpoints":
        directory = Path(config.out) if config.out else named.parent.parent
        return RunDirectory(path=directory, saved=checkpoint.load(named), existed=directory.exists())
    directory = named or (Path(config.out) if config.out else _free(model_slug, config.method))
    found = checkpoint.complete(directory / "checkpoints")
    if config.resume:
        if not found:
            raise NotFound(f"nothing to resume: no complete checkpoint below {directory / 'checkpoints'}")
        return RunDirectory(path=directory, saved=checkpoint.load(found[-1]), existed=True)
    if found:
        raise UsageError(
            f"{directory} holds a run with a complete checkpoint (step {checkpoint.step_of(found[-1])}): "
            "go on with --resume, or name another --out"
        )
    check_output_directory(directory)
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "config.yaml").is_file():
        raise UsageError(f"{directory} exists and is not a run directory: name another --out")
    return RunDirectory(path=directory, saved=None, existed=directory.exists())


def check_same_run(identity: dict[str, Any], saved: dict[str, Any]) -> None:
    """Refuse to continue with other settings, data or weights than the checkpoint's.

    Args:
        identity: of the run that goes on: hashes of weights and data, inclusion probabilities, number of processes and
            settings.
        saved: the same of the checkpoint, as read from JSON.

    Raises:
        UsageError: they differ; the message names the first difference.
    """
    what = {"weights_sha256": "model's weights differ", "data_sha256": "data differ",
            "inclusion": "layer table differs", "processes": "number of processes differs"}  # fmt: skip
    ours = json.loads(json.dumps(identity))  # as a checkpoint holds it
    for part, text in what.items():
        if ours[part] != saved.get(part):
            raise UsageError(f"--resume: the {text} from the checkpoint's; give the same, or start a new run")
    asked, earlier = ours["config"], saved.get("config") or {}
    for key in sorted((asked.keys() | earlier.keys()) - MAY_CHANGE):
        if asked.get(key) != earlier.get(key):
            raise UsageError(
                f"--resume: {key} is {asked.get(key)!r} and the checkpoint was made with {earlier.get(key)!r}; "
                "give the same settings, or start a new run"
            )


def _free(model_slug: str, method: str) -> Path:
    """runs/<model>-<method>-<n> with the first n that is not taken."""
    number = 1
    while (path := Path("runs") / f"{model_slug}-{method}-{number}").exists():
        number += 1
    return path

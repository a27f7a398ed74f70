"""Reading the files of a finished run: run.json and metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from htsr.errors import BadInput, NotFound


def refuse_unfinished(path: Path) -> None:
    """Check that a directory is not that of an unfinished run.

    Raises:
        BadInput: The run was started and has not finished.
    """
    if (path / "config.yaml").is_file() and not (path / "run.json").is_file():
        raise BadInput(f"{path} is a run that has not finished: continue it with `owlore train --resume {path}`")


def read_run(directory: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """run.json and the rows of metrics.jsonl of a finished run.

    Raises:
        NotFound: There is no such directory.
        BadInput: It is not the directory of a finished run.
    """
    path = Path(directory)
    if not path.exists():
        raise NotFound(f"{path}: no such run directory")
    refuse_unfinished(path)
    try:
        record = json.loads((path / "run.json").read_text())
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        detail = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{path} is not the directory of a finished run (run.json, metrics.jsonl): {detail}") from error
    if record.get("schema") != "owlore-run/1":
        raise BadInput(f"{path}/run.json has schema {record.get('schema')!r}, expected 'owlore-run/1'")
    return record, rows

"""Reading the rows of a task from files or from the Hub, with a digest for the result."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htsr.errors import BadInput, HtsrError, NotFound
from owlore.data.files import read_data_set, read_file
from owlore.evaluation.items import Item
from owlore.evaluation.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The data of a task.

    Attributes:
        items: The questions.
        shots: The few-shot examples.
        provenance: Where both come from.
    """

    items: tuple[Item, ...]
    shots: tuple[Item, ...]
    provenance: dict[str, Any]


def read_task(
    task: Task, *, data_dir: str | Path | None, limit: int | None, shots: int | None, shuffle: int | None
) -> Asked:
    """Read the items and the few-shot examples of a task.

    Args:
        task: The task.
        data_dir: Directory with the tasks' files; None reads from the Hugging Face Hub.
        limit: Number of items, after the shuffle; None takes all.
        shots: Number of few-shot examples; None takes the task's default.
        shuffle: Seed by which the items are shuffled; None does not shuffle.

    Raises:
        NotFound: The data are missing; the message names the files.
        BadInput: A row has another form, or there are too few examples.
    """
    items, provenance = _items(task, data_dir)
    rows = len(items)
    if shuffle is not None:
        random.Random(shuffle).shuffle(items)
    count = task.shots if shots is None else shots
    examples: tuple[Item, ...] = ()
    if count:
        examples, provenance["shots"] = _examples(task, data_dir, count)
    provenance |= {"rows": rows, "shuffle": shuffle}
    return Asked(items=tuple(items[:limit]), shots=examples, provenance=provenance)


def _items(task: Task, data_dir: str | Path | None) -> tuple[list[Item], dict[str, Any]]:
    if data_dir is not None:
        path = _find(task.name, task.files, Path(data_dir))
        records, digest = _records(path)
        return _parsed(task, task.parse, records, str(path)), {"source": path.name, "sha256": digest}
    if task.hub is None:
        raise NotFound(f"{task.name}: not on the Hub in this form; give --data-dir with {' or '.join(task.files[:3])}")
    records = _from_hub(task, task.hub.split)
    digest = hashlib.sha256(json.dumps(records, default=str).encode()).hexdigest()
    source = ":".join(filter(None, (task.hub.path, task.hub.name, task.hub.split)))
    return _parsed(task, task.hub.item, records, source), {"source": source, "sha256": digest}


def _examples(task: Task, data_dir: str | Path | None, count: int) -> tuple[tuple[Item, ...], dict[str, Any]]:
    """The first `count` examples, as the harness's `first_n` takes them, and where they come from."""
    if data_dir is not None:
        path = _find(f"{task.name}, few-shot examples", task.shot_files, Path(data_dir))
        records, digest = _records(path)
        examples = _parsed(task, task.parse, records[:count], str(path))
        facts: dict[str, Any] = {"source": path.name, "sha256": digest}
    elif task.hub is None:
        raise NotFound(f"{task.name}: few-shot examples need --data-dir with {' or '.join(task.shot_files[:3])}")
    else:
        split = "dev" if task.hub.path == "cais/mmlu" else "train"
        examples = _parsed(task, task.hub.item, _from_hub(task, split)[:count], task.hub.path)
        facts = {"source": f"{task.hub.path}:{split}"}
    if len(examples) < count:
        raise BadInput(f"{task.name}: {len(examples)} few-shot examples in {facts['source']}, expected {count}")
    return tuple(examples), {**facts, "count": count}


def _find(what: str, names: Sequence[str], directory: Path) -> Path:
    for name in names:
        if (directory / name).is_file():
            return directory / name
    looked = ", ".join(dict.fromkeys(names)) or "no file holds them"
    raise NotFound(f"{what}: no data below {directory}; looked for {looked}")


def _records(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Rows of a file, and its digest; the rows of a text are its `articles`, each with the key `page`."""
    records, digest = read_file(path)
    if path.suffix == ".txt":
        records = [{"page": page} for page in articles("".join(str(row["text"]) for row in records))]
    return records, digest


def articles(text: str) -> list[str]:
    """A text split at WikiText's headings (`= Title =`); a text without headings is one article."""
    starts = [found.start() for found in re.finditer(r"(?m)^ ?= [^=\n]+ = *$", text)]
    pieces = [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True)]
    return [piece for piece in pieces if piece.strip()] or [text]


def _parsed(task: Task, parse: Any, records: Sequence[dict[str, Any]], source: str) -> list[Item]:
    made = []
    for number, record in enumerate(records, 1):
        try:
            made.append(parse(record))
        except (BadInput, KeyError, IndexError, TypeError, ValueError) as error:
            why = str(error) if isinstance(error, HtsrError) else f"{type(error).__name__} {error}"
            raise BadInput(f"{source}: row {number} is not one of {task.name}: {why}") from error
    if not made:
        raise BadInput(f"{source}: no rows; expected those of {task.name}")
    return made


def _from_hub(task: Task, split: str) -> list[dict[str, Any]]:
    """Rows of a data set on the Hub.

    Raises:
        NotFound: It is not cached and cannot be reached; the message names --data-dir and its files.
    """
    assert task.hub is not None
    name = ":".join(filter(None, (task.hub.path, task.hub.name, split)))
    try:
        return [dict(row) for row in read_data_set(name)]
    except NotFound as error:
        raise NotFound(f"{task.name}: {error}; or give --data-dir with {task.files[0]}") from error

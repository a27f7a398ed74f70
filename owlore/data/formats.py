"""Converting records to examples by the format of their columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from htsr.errors import BadInput
from owlore.data.columns import EXPECTED, format_of
from owlore.data.examples import Example, Rows, alpaca_prompt, fingerprint
from owlore.data.files import Record, locate_data, read_data_set, read_file

ROLES = {
    "human": "user", "user": "user", "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip


def load_rows(data: Any) -> Rows:
    """Every row of a data set as an `Example`.

    Args:
        data: A path (json, jsonl, csv, parquet, text), `demo-data`, the name NAME[:CONFIG][:SPLIT] of a Hugging Face
            data set, a list of dicts, a pandas DataFrame or a `datasets.Dataset`.

    Raises:
        NotFound: The data do not exist.
        BadInput: Their content is in no known format.
    """
    if isinstance(data, str | Path):
        path = locate_data(data)
        if path is not None and path.is_file():
            records, digest = read_file(path)
            return rows_from(records, source=str(data), sha256=digest)
        return rows_from(read_data_set(str(data)), source=str(data))
    return rows_from(_records_of(data), source=f"({type(data).__name__} in memory)")


def rows_from(records: Sequence[Record], *, source: str, sha256: str | None = None) -> Rows:
    """Convert records to examples, all by the format of the first one's columns.

    Args:
        records: At least one record.
        source: Where they come from, for messages and provenance.
        sha256: Digest of their file; None computes one from the examples.

    Raises:
        BadInput: There are no records, the columns are of no known format, or a record does not fit it.
    """
    if not records:
        raise BadInput(f"{source}: holds no rows; expected at least one")
    columns = [str(name).strip().lower() for name in records[0]]
    name = format_of(columns)
    if name is None:
        raise BadInput(f"{source}: got the columns {', '.join(columns) or '(none)'}; expected one of: {EXPECTED}")
    examples = []
    for i, record in enumerate(records, 1):
        try:
            examples.append(_example(name, {str(k).strip().lower(): v for k, v in record.items()}))
        except ValueError as error:
            raise BadInput(f"{source}: row {i} ({name}) {error}") from error
    provenance = {
        "source": source,
        "sha256": sha256 or fingerprint(examples),
        "rows": len(examples),
        "format": name,
    }
    return Rows(examples=examples, provenance=provenance)


def _records_of(data: Any) -> list[Record]:
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        return data.to_dict("records")
    if isinstance(data, dict) and "train" in data:  # a DatasetDict
        return list(data["train"])
    if isinstance(data, Iterable) and not isinstance(data, dict | bytes):
        records = list(data)
        wrong = next((type(r).__name__ for r in records if not isinstance(r, dict)), None)
        if wrong is None:
            return records
        raise BadInput(f"data: got a sequence that holds {wrong}; expected dicts with the columns {EXPECTED}")
    raise BadInput(f"data: got {type(data).__name__}; expected a path, a list of dicts, a DataFrame or a Dataset")


def _example(name: str, record: Record) -> Example:
    """The example of a record in a format.

    Raises:
        ValueError: The record does not fit the format; the caller adds the source and the row to the message.
    """
    match name:
        case "messages" | "sharegpt":
            turns = _turns(_cell(record, "messages" if name == "messages" else "conversations"))
            system = record.get("system")
            if isinstance(system, str) and system and (not turns or turns[0][0] != "system"):
                turns = (("system", system), *turns)
            return Example(messages=turns)
        case "alpaca":
            prompt = alpaca_prompt(_text(record, "instruction"), _text(record, "input", optional=True))
            return Example(prompt=prompt, answer=_text(record, "output"))
        case "prompt/completion" | "prompt/response":
            answer = name.split("/")[1]
            if _is_list(record.get("prompt")) and _is_list(record.get(answer)):
                return Example(messages=_turns(record["prompt"]) + _turns(record[answer]))
            return Example(prompt=_text(record, "prompt"), answer=_text(record, answer))
        case "question/answer":
            return Example(prompt=alpaca_prompt(_text(record, "question")), answer=_text(record, "answer"))
        case _:
            return Example(text=_text(record, "text"))


def _cell(record: Record, column: str) -> Any:
    if column not in record:
        raise ValueError(f"has no column {column!r}; got {', '.join(record) or 'none'}")
    return record[column]


def _text(record: Record, column: str, *, optional: bool = False) -> str:
    """A cell as text; a missing value (None, NaN) is an empty text, and a number is converted."""
    value = record.get(column) if optional else _cell(record, column)
    if isinstance(value, str):
        return _unicode(value, f"column {column!r}")
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool | int | float) or hasattr(value, "item"):
        return str(value)
    raise ValueError(f"holds {type(value).__name__} in column {column!r}; expected text")


def _unicode(text: str, where: str) -> str:
    """Check that a text is valid Unicode: JSON may contain half of a surrogate pair, which no tokenizer can read.

    Raises:
        ValueError: It is not valid; `where` names its cell in the message.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a surrogate pair in {where}; expected valid Unicode") from error
    return text


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1)


def _turns(value: Any) -> tuple[tuple[str, str], ...]:
    """Messages as (role, text) pairs from OpenAI's role/content or ShareGPT's from/value."""
    if value is None or not _is_list(value):
        raise ValueError(f"holds {type(value).__name__} as its messages; expected a list of role and content")
    return tuple(map(_turn, value))


def _turn(message: Any) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"holds {type(message).__name__} as a message; expected role and content")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"has a message of role {role!r}; expected one of {', '.join(sorted(ROLES))}")
    if content is not None and _is_list(content):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    if content is not None and not isinstance(content, str):
        raise ValueError(f"has a message whose content is {type(content).__name__}; expected text")
    return ROLES[role.lower()], _unicode(content or "", "a message")

"""Reading records from JSON, JSON lines, csv, parquet, plain text and Hugging Face data sets.

The format of a file is found from its content where that is clear, else from its suffix.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from htsr.errors import BadInput, NotFound, first_line
from owlore.data.columns import format_of

Record = dict[str, Any]

PARQUET_MAGIC = b"PAR1"
LOOKS_LIKE_JSON = re.compile(r'\s*(\[\s*[\[{\]]|\{\s*["}])')
DATA_SET_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+){0,2}")
FILE_SUFFIXES = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".md"}
ROW_LISTS = ("data", "rows", "train", "instances", "examples")


def locate_data(data: str | Path) -> Path | None:
    """The file or directory that `data` names.

    Returns:
        The path, or None if `data` can only be the name of a Hugging Face data set.

    Raises:
        NotFound: `data` looks like a path and does not exist.
    """
    if str(data) == "demo-data":
        return Path(str(files("owlore") / "assets" / "demo-data.jsonl"))
    path = Path(data).expanduser()
    if path.exists():
        return path
    is_name = isinstance(data, str) and DATA_SET_NAME.fullmatch(data) and path.suffix.lower() not in FILE_SUFFIXES
    if not is_name:
        raise NotFound(f"data {str(data)!r}: no such file; give a path, a Hugging Face data set name or demo-data")
    return None


def read_file(path: Path) -> tuple[list[Record], str]:
    """Read a data file.

    Returns:
        The records, and the sha256 of the file. A plain text is one record `{"text": ...}`.

    Raises:
        BadInput: The file cannot be parsed; the message has the line, if there is one.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if content[:4] == PARQUET_MAGIC:
        return _parquet(content, path), digest
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not UTF-8 text; expected json, csv, parquet or text") from error
    suffix = path.suffix.lower()
    if suffix in {".json", ".jsonl", ".ndjson"} or LOOKS_LIKE_JSON.match(text):
        return _json(text, path), digest
    if suffix in {".csv", ".tsv"} or _has_known_header(text):
        return _csv(text, path), digest
    return [{"text": text}], digest


def _json(text: str, path: Path) -> list[Record]:
    """Records of a JSON array, of JSON lines, or of one object with the list of rows under a usual name."""
    if text.lstrip()[:1] == "[":
        rows = _parse(text, path, 1)
    else:
        rows = _json_object(text, path)
        if rows is None:
            rows = [_parse(line, path, i) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadInput(f"{path}: row {i} is {type(row).__name__}, expected an object with named columns")
    return rows


def _json_object(text: str, path: Path) -> list[Record] | None:
    """The rows of a file that is one JSON object, or None for JSON lines."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        several_lines = text.lstrip().split("\n", 1)[0].strip() == "{"  # one invalid object over several lines
        if error.msg == "Extra data" or not several_lines:
            return None
    except RecursionError:
        pass
    value = _parse(text, path, 1)
    if not isinstance(value, dict):
        return None
    lists = [value[key] for key in ROW_LISTS if isinstance(value.get(key), list)]
    return lists[0] if lists else [value]


def _parse(text: str, path: Path, line: int) -> Any:
    def refuse(name: str) -> None:
        raise BadInput(f"{path}: line {line} holds {name}, which is not JSON; expected numbers or strings")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise BadInput(
            f"{path}: line {line + error.lineno - 1} is not valid JSON ({error.msg}, column {error.colno}); "
            "expected one JSON object a line, or one JSON array"
        ) from error
    except RecursionError as error:
        raise BadInput(f"{path}: line {line} is nested too deeply; expected rows of strings") from error


def _has_known_header(text: str) -> bool:
    header = text.split("\n", 1)[0].strip()
    columns = [cell.strip().strip('"').lower() for cell in header.split("\t" if "\t" in header else ",")]
    return len(columns) > 1 and format_of(columns) is not None


def _csv(text: str, path: Path) -> list[Record]:
    import pandas as pd

    header = text.split("\n", 1)[0]
    separator = "\t" if "\t" in header and "," not in header else ","
    try:
        frame = pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise BadInput(f"{path}: not a readable csv file ({str(error).strip()}); expected one header line") from error
    return frame.to_dict("records")


def _parquet(content: bytes, path: Path) -> list[Record]:
    import pandas as pd

    try:
        return pd.read_parquet(io.BytesIO(content)).to_dict("records")
    except ImportError as error:
        raise BadInput(f"{path}: reading parquet needs pyarrow; python -m pip install pyarrow") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not a readable parquet file ({first_line(error)})") from error


def read_data_set(name: str) -> list[Record]:
    """The records of a Hugging Face data set; a cached one needs no network.

    Args:
        name: NAME[:CONFIG][:SPLIT] on the Hub, or a directory with a data set. The split is `train` by default.

    Raises:
        NotFound: It does not exist, or it is not cached and the Hub cannot be reached.
        BadInput: It cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise NotFound(
            f"data {name!r} is no file, and Hugging Face data sets need: python -m pip install datasets"
        ) from error
    was_shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return list(_load(datasets, name))
    except (ConnectionError, FileNotFoundError) as error:
        raise NotFound(
            f"data {name!r}: no such file, and no such Hugging Face data set can be reached ({first_line(error)}); "
            "check the name, or be online"
        ) from error
    except (ValueError, OSError) as error:
        raise BadInput(f"data {name!r} cannot be loaded as NAME[:CONFIG][:SPLIT]: {first_line(error)}") from error
    finally:
        if was_shown:
            datasets.enable_progress_bars()


def _load(datasets: Any, name: str) -> Any:
    if Path(name).is_dir():
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(name)
            return saved["train"] if isinstance(saved, dict) and "train" in saved else saved
        return datasets.load_dataset(name, split="train")
    path, *rest = name.split(":")
    config, split = (rest[0], rest[1]) if len(rest) == 2 else (None, rest[0] if rest else "train")
    return datasets.load_dataset(path, config, split=split)

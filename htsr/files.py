"""Small files: read with checks, written in one step; and the directories where files go."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from htsr.errors import BadInput, NotFound, UsageError

MAX_JSON_BYTES = 1_000_000


def read_json(path: Path, *, expected: str) -> Any:
    """Read the JSON value in a file.

    Args:
        path: the file, at most 1 MB.
        expected: names the kind of file in the messages.

    Raises:
        NotFound: there is no such file.
        BadInput: it is too big, not UTF-8, not JSON, nested too deeply, or holds NaN or Infinity.
    """
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise BadInput(f"{path}: got a directory, expected {expected}; name the file in it")
        if size > MAX_JSON_BYTES:
            raise BadInput(f"{path}: got {size} bytes, expected {expected} of at most {MAX_JSON_BYTES}")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except FileNotFoundError as error:
        raise NotFound(f"{path}: not found; expected {expected}") from error
    except RecursionError as error:
        raise BadInput(f"{path}: nested too deeply, expected {expected}") from error
    except BadInput:
        raise
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of thousands of digits
        raise BadInput(f"{path}: not readable as JSON ({error}), expected {expected}") from error


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 so that a reader sees the old file or the new one, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` so that a reader sees the old file or the new one, never a part; directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output_directory(directory: Path) -> None:
    """Raise UsageError when nothing could be written to `directory`; called before hours of work, not after them."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: got a file, expected a directory to write to")
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"{directory}: {existing} is a file, expected a directory; give another --out")
    if not os.access(existing, os.W_OK):
        raise UsageError(
            f"{directory}: {existing} cannot be written to, expected a directory of yours; give another --out"
        )


def cache_directory(package: str) -> Path:
    """$HTSR_CACHE or $OWLORE_CACHE by the name of the package, else its folder in the user's cache directory."""
    if named := os.environ.get(f"{package.upper()}_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / package
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / package
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / package


def slug(model: str) -> str:
    """A directory name for a model: the last part of a path, an id with its organisation."""
    path = Path(model).expanduser()
    name = path.resolve().name if path.exists() else model
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip(".-") or "model"


def refuse_constant(name: str) -> NoReturn:
    """Raise a ValueError for NaN and Infinity; for `parse_constant` of `json.loads`."""
    raise ValueError(f"{name} is not a number JSON allows")

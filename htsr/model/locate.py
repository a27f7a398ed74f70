"""From what a user names to a path on this machine: `demo`, a directory, a file, or a Hugging Face id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from htsr.errors import BadInput, NotFound, first_line
from htsr.files import read_json

DEMO = Path(__file__).parents[1] / "assets" / "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = [
    "*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "*token*.json", "*.model",
    "vocab*", "merges.txt", "chat_template*",
]  # fmt: skip
WEIGHTS = ("*.safetensors", "*.gguf", "pytorch_model*.bin")


def locate(model: str | Path, revision: str | None = None, *, allow_pickle: bool = False) -> Path:
    """Find the directory or file that the user names.

    Args:
        model: `demo`, a path, or a Hugging Face id, which is looked up in the local cache first.
        revision: branch, tag or commit of an id.
        allow_pickle: downloads pickled weights too.

    Raises:
        NotFound: nothing of that name exists here, in the cache or (unless offline) on the Hub.
    """
    if str(model) == "demo":
        return DEMO
    path = Path(model).expanduser()
    if path.exists():
        return path
    name = str(model)
    if isinstance(model, Path) or not is_hub_id(name):
        raise NotFound(f"{name}: no such file or directory; name a directory, a .safetensors or .gguf file, or an id")
    return _hub_snapshot(name, revision, allow_pickle)


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hugging Face id, `name` or `organisation/name`."""
    file_like = name.endswith((".safetensors", ".gguf", ".bin", ".pt", ".pth"))
    return HUB_ID.fullmatch(name) is not None and ".." not in name and not file_like


def snapshot_revision(path: Path) -> str | None:
    """The commit of a directory that lies in a Hugging Face cache, else None."""
    cached = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    return path.name if cached else None


def inside(root: Path, file: Path) -> Path:
    """Resolve a file of a model's directory, and refuse one that a link leads out of it.

    Args:
        root: the model's directory.
        file: the path of the file; it may lie in the blobs of the Hub cache that holds `root`.

    Returns:
        The path without links.

    Raises:
        BadInput: the file does not exist, is no regular file, or lies elsewhere.
    """
    directory, real = root.resolve(), file.resolve()
    if not real.exists():
        raise BadInput(f"{file.name}: the model's directory has no such file (or its link leads nowhere)")
    snapshot = next((path for path in (directory, *directory.parents) if snapshot_revision(path)), None)
    allowed = [directory] if snapshot is None else [directory, snapshot.parents[1] / "blobs"]
    if not any(real.is_relative_to(path) for path in allowed):
        raise BadInput(f"{file.name}: got a link that leads out of the model's directory; copy the file into it")
    if not real.is_file():
        raise BadInput(f"{file.name}: got something that is not a regular file, expected weights or JSON")
    return real


def read_object(root: Path, file: Path, *, expected: str) -> dict[str, Any]:
    """The JSON object in a file of a model's directory.

    Args:
        root: the directory, which the file may not lead out of (`inside`).
        file: the path of the file.
        expected: names the kind of file in the messages.

    Raises:
        BadInput: the file cannot be used, or holds something else than an object.
    """
    value = read_json(inside(root, file), expected=expected)
    if not isinstance(value, dict):
        raise BadInput(f"{file.name}: got a {type(value).__name__}, expected an object")
    return value


def read_config(path: Path) -> dict[str, Any] | None:
    """config.json of the model's directory `path`; None where there is none, and for a lone file."""
    file = path / "config.json"
    if not (file.exists() or file.is_symlink()):
        return None
    return read_object(path, file, expected="a model's configuration")


def _hub_snapshot(name: str, revision: str | None, allow_pickle: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    options: dict[str, Any] = {
        "revision": revision,
        "cache_dir": constants.HF_HUB_CACHE,
        "allow_patterns": HUB_FILES + (["pytorch_model*.bin", "*.bin.index.json"] if allow_pickle else []),
    }
    try:
        cached = Path(snapshot_download(name, local_files_only=True, **options))
        if any(next(cached.glob(pattern), None) for pattern in WEIGHTS):
            return cached
    except HFValidationError as error:
        raise NotFound(f"{name}: neither a path here nor a valid Hugging Face id") from error
    except LocalEntryNotFoundError:
        pass
    if constants.HF_HUB_OFFLINE:
        raise NotFound(
            f"{name}: neither a path here nor a model in the local Hugging Face cache, and HF_HUB_OFFLINE is set; "
            "name a directory, or unset it to download"
        )
    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:
        raise NotFound(
            f"{name}: neither a path here nor in the local Hugging Face cache, and the Hub gave none "
            f"({first_line(error)}): check the spelling, the network, or your access"
        ) from error

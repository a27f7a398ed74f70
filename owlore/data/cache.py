"""A cache of tokenised rows: the same examples, tokenizer and length are encoded once.

An entry is a safetensors file whose name is a digest of everything that the encoding depends on. It is written under
another name and renamed; a damaged or inconsistent entry is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from owlore.data import examples, templates, tokenise
from owlore.data.examples import Example, fingerprint
from owlore.data.tokenise import Encoded, encode

MIN_ROWS = 2000  # fewer rows are encoded as fast as they are looked up
MAX_ENTRIES = 16
ARRAYS = {"ids": np.int32, "offsets": np.int64, "trained": np.uint8, "cut": np.bool_, "groups": np.int64}


def encode_cached(
    rows: Sequence[Example], tokenizer: Any, seq_len: int, directory: Path | None
) -> tuple[Encoded, dict[str, Any]]:
    """`encode` with a cache.

    Args:
        rows: The examples.
        tokenizer: The tokenizer.
        seq_len: Largest number of tokens of a row.
        directory: Directory of the entries; None caches nothing. One that cannot be written to is ignored.

    Returns:
        The encoded rows, and {"cached": whether they were read from the cache, "key": the entry's key or None}.
    """
    key = None if directory is None or len(rows) < MIN_ROWS else _key(rows, tokenizer, seq_len)
    if directory is None or key is None:
        return encode(rows, tokenizer, seq_len), {"cached": False, "key": None}
    path = directory / f"{key}.safetensors"
    found = _read(path)
    if found is None:
        encoded = encode(rows, tokenizer, seq_len)
        _write(encoded, path)
        return encoded, {"cached": False, "key": key}
    return found, {"cached": True, "key": key}


def _key(rows: Sequence[Example], tokenizer: Any, seq_len: int) -> str | None:
    """A digest of everything that the encoding depends on.

    Returns:
        The digest, or None for a tokenizer that cannot be serialised and a chat template that reads the clock.
    """
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = getattr(tokenizer, "chat_template", None)
    if backend is None or "strftime_now" in str(template):
        return None
    content = {
        "rows": fingerprint(rows),
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "class": type(tokenizer).__name__,
        "special": [tokenizer.all_special_tokens, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "adds": [getattr(tokenizer, f"add_{end}_token", None) for end in ("bos", "eos")],
        "template": template,
        "seq_len": seq_len,
        "code": [_code(), tokenizers.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


@cache
def _code() -> str:
    """A digest of the modules that encode, so that an entry of other code is never used."""
    sources = (Path(str(module.__file__)).read_bytes() for module in (examples, templates, tokenise))
    return hashlib.sha256(b"".join(sources)).hexdigest()


def _read(path: Path) -> Encoded | None:
    """The entry, or None if there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
            metadata = file.metadata() or {}
        if metadata.get("sha256") != _digest(arrays) or any(arrays[n].dtype != dtype for n, dtype in ARRAYS.items()):
            return None
        return Encoded(**arrays, pad_id=int(metadata["pad_id"]))
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _write(encoded: Encoded, path: Path) -> None:
    arrays = {name: np.ascontiguousarray(getattr(encoded, name)) for name in ARRAYS}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, partial, metadata={"sha256": _digest(arrays), "pad_id": str(encoded.pad_id)})
        partial.replace(path)
        for old in sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)[:-MAX_ENTRIES]:
            old.unlink(missing_ok=True)
    except (OSError, SafetensorError):  # the disk is full or read-only; the run does not need the entry
        with suppress(OSError):
            partial.unlink()


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return digest.hexdigest()

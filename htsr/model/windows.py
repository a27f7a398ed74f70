"""Calibration text: where it comes from, its tokens, and the windows that are chosen from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from htsr.errors import BadInput, NotFound, UsageError

BUILTIN = "builtin"


@dataclass(frozen=True, kw_only=True)
class Text:
    """Calibration text.

    Attributes:
        source: the text as the user named it.
        sha256: hash of the file's bytes.
        texts: the texts in file order.
    """

    source: str
    sha256: str
    texts: tuple[str, ...]


def read_texts(calibration: str | Path = BUILTIN) -> Text:
    """Read the calibration text.

    Args:
        calibration: `builtin` (the packaged public-domain text), a .txt file (one text) or a .jsonl file (a `text` a
            row).

    Raises:
        NotFound: there is no such file.
        BadInput: another kind of file, not UTF-8, a row without text, or nothing but white space.
    """
    if str(calibration) == BUILTIN:
        raw = resources.files("htsr").joinpath("assets/calibration.txt").read_bytes()
        texts = [raw.decode("utf-8")]
    else:
        raw, texts = _read_file(Path(calibration))
    if not any(text.strip() for text in texts):
        raise BadInput(f"{calibration}: got no text, expected some to calibrate with")
    return Text(source=str(calibration), sha256=hashlib.sha256(raw).hexdigest(), texts=tuple(texts))


def cut_windows(tokens: Any, *, samples: int, seq_len: int, seed: int) -> Tensor:
    """Cut tokens into consecutive windows and choose some of them.

    Args:
        tokens: token ids of all texts joined, shape (n,).
        samples: number of windows, at least 1; all are taken when there are no more.
        seq_len: tokens in a window, at least 1.
        seed: chooses the windows; they stay in order.

    Returns:
        int64, shape (windows, seq_len); the tokens after the last full window are dropped.

    Raises:
        UsageError: samples or seq_len is below 1.
        BadInput: there are fewer tokens than one window.
    """
    for name, value in (("samples", samples), ("seq-len", seq_len)):
        if value < 1:
            raise UsageError(f"{name}: got {value}, expected at least 1")
    ids = np.asarray(tokens, dtype=np.int64)
    count = len(ids) // seq_len
    if count == 0:
        raise BadInput(f"calibration text: got {len(ids)} tokens, expected at least one window of {seq_len}; "
                       "give a longer text or a smaller --seq-len")  # fmt: skip
    chosen = np.arange(count)
    if count > samples:
        chosen = np.sort(np.random.default_rng(seed).choice(count, size=samples, replace=False))
    return torch.from_numpy(ids[: count * seq_len].reshape(count, seq_len)[chosen])


def tokenise(texts: tuple[str, ...], tokenizer: Any) -> np.ndarray:
    """The tokens of all texts joined in order, without special tokens."""
    pieces = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    return np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])


def _read_file(path: Path) -> tuple[bytes, list[str]]:
    if not path.exists():
        raise NotFound(f"{path}: calibration text not found; give a .txt or .jsonl file, builtin or none")
    if path.suffix not in (".txt", ".jsonl") or not path.is_file():
        raise BadInput(f"{path}: expected a .txt file (one text) or a .jsonl file (rows with `text`)")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 at byte {error.start}, expected UTF-8 text") from error
    return raw, [text] if path.suffix == ".txt" else list(_rows(path, text))


def _rows(path: Path, lines: str) -> Iterator[str]:
    for number, line in enumerate(lines.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}, line {number}: not JSON ({error}), expected rows with `text`") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise BadInput(f"{path}, line {number}: expected an object whose `text` is a string")
        yield row["text"]

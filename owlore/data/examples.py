"""The one record that every data format becomes, and the Alpaca prompt text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ALPACA_INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_INTRODUCTION_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
INSTRUCTION = "\n\n### Instruction:\n"
INPUT = "\n\n### Input:\n"
RESPONSE = "\n\n### Response:\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row of data: a dialogue (`messages`), a `prompt` with its `answer`, or a plain `text`."""

    messages: tuple[tuple[str, str], ...] | None = None
    prompt: str | None = None
    answer: str | None = None
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """All examples of a data set and where they came from: `source`, `sha256`, `rows`, `format`."""

    examples: list[Example]
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.examples)


def alpaca_prompt(instruction: str, extra: str = "") -> str:
    """The prompt of Stanford Alpaca, with or without an input.

    Note: the line break after `### Response:` is the one that Alpaca-LoRA and LLM-Adapters added; without it the
    first token of an answer depends on the colon before it.
    """
    if extra:
        return ALPACA_INTRODUCTION_WITH_INPUT + INSTRUCTION + instruction + INPUT + extra + RESPONSE
    return ALPACA_INTRODUCTION + INSTRUCTION + instruction + RESPONSE


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 over the content of examples that have no file of their own."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.messages, example.prompt, example.answer, example.text)).encode())
    return digest.hexdigest()

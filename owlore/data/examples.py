"""The record that every data format is converted to, and the text of the Alpaca prompt."""

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
    """One row of data: a dialogue, a prompt with its answer, or a plain text; the other fields are None.

    Attributes:
        messages: The turns of a dialogue as (role, text).
        prompt: A prompt.
        answer: The answer to the prompt, which is trained.
        text: A plain text, which is trained.
    """

    messages: tuple[tuple[str, str], ...] | None = None
    prompt: str | None = None
    answer: str | None = None
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """All examples of a data set.

    Attributes:
        examples: The rows.
        provenance: Where they come from: `source`, `sha256`, `rows`, `format`.
    """

    examples: list[Example]
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.examples)


def alpaca_prompt(instruction: str, extra: str = "") -> str:
    """The prompt of Stanford Alpaca for an instruction, with the input `extra` unless that is empty.

    Note: Alpaca-LoRA and LLM-Adapters added the line break after `### Response:`; without it the first token of an
    answer depends on the colon before it.
    """
    if extra:
        return ALPACA_INTRODUCTION_WITH_INPUT + INSTRUCTION + instruction + INPUT + extra + RESPONSE
    return ALPACA_INTRODUCTION + INSTRUCTION + instruction + RESPONSE


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 of the content of examples, for data without a file."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.messages, example.prompt, example.answer, example.text)).encode())
    return digest.hexdigest()

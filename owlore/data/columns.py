"""The format of a data set, found from the names of its columns and not from the name of its file."""

from __future__ import annotations

from collections.abc import Iterable

# The first format whose columns are all there is taken. `question, answer` is GSM8K's format; further columns (choices,
# passages) would be dropped although the question needs them, so no others are allowed.
FORMATS: tuple[tuple[str, frozenset[str]], ...] = (
    ("messages", frozenset({"messages"})),
    ("sharegpt", frozenset({"conversations"})),
    ("alpaca", frozenset({"instruction", "output"})),
    ("prompt/completion", frozenset({"prompt", "completion"})),
    ("prompt/response", frozenset({"prompt", "response"})),
    ("question/answer", frozenset({"question", "answer"})),
    ("text", frozenset({"text"})),
)
EXPECTED = (
    "instruction,input,output (alpaca); messages or conversations (chat); prompt,completion; question,answer; text"
)


def format_of(columns: Iterable[str]) -> str | None:
    """The name of the format with these lower-case columns, or None."""
    got = set(columns)
    for name, needed in FORMATS:
        if needed <= got and (name != "question/answer" or got - needed <= {"id", "idx"}):
            return name
    return None

"""Which columns make which format of a data set: told by their names, never by the name of the file."""

from __future__ import annotations

from collections.abc import Iterable

# In this order: the first whose columns are all there wins. `question, answer` alone is GSM8K's form; with more
# columns (choices, passages) it would drop what the question is about, so it must be exactly these.
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
    """The name of the format that these (lower-case) columns make, or None."""
    got = set(columns)
    for name, needed in FORMATS:
        if needed <= got and (name != "question/answer" or got - needed <= {"id", "idx"}):
            return name
    return None

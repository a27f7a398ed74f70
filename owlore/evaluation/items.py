"""One question of a task, from a row in LLM-Adapters' instruction format or from the data set's own columns.

An instruction holds question, choices and labels in one text. `parse` takes it apart and `instruction` puts it together
again; on every row of the published test files the second gives back what the first was given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from htsr.errors import BadInput

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question with its choices (none where a number is asked for).

    gold: index of the right choice, -1 without choices. answer: the label or number that a generated text is held
    against. instruction: what the model reads in the generate protocol. target: a worked answer, for few-shot prompts.
    """

    question: str
    choices: tuple[str, ...] = ()
    gold: int = -1
    answer: str = ""
    instruction: str = ""
    target: str = ""
    subject: str = ""

    def to_doc(self) -> dict[str, Any]:
        """As a row of a data set."""
        return {**asdict(self), "choices": list(self.choices)}


@dataclass(frozen=True, kw_only=True)
class Format:
    """How LLM-Adapters words a task.

    opening: the text before the question. label: what a choice is called (`Answer` gives Answer1:, and answer1 as its
    label). between: what separates choices; before_format: what separates the last one from the format line.
    """

    opening: str
    label: str
    between: str = " "
    before_format: str = "\n\n"

    def instruction(self, question: str, choices: Sequence[str]) -> str:
        """Question and choices as one instruction."""
        shown = self.between.join(f"{self.label}{i}: {choice}" for i, choice in enumerate(choices, 1))
        labels = "/".join(self.labels(len(choices)))
        return f"{self.opening}{question}\n\n{shown}{self.before_format}Answer format: {labels}"

    def labels(self, count: int) -> list[str]:
        """answer1, answer2, ..."""
        return [f"{self.label.lower()}{i}" for i in range(1, count + 1)]

    def parse(self, row: Row) -> Item:
        """Question and choices of an instruction.

        Raises: BadInput for a text of another form, or an answer that is none of the labels.
        """
        text = str(row.get("instruction", ""))
        labels = text.rpartition("Answer format: ")[2].split("/")
        middle = re.escape(self.between).join(f"{self.label}{i}: (.*?)" for i in range(1, len(labels) + 1))
        form = f"{re.escape(self.opening)}(.*?)\n\n{middle}{re.escape(self.before_format)}Answer format: [^\n]*"
        found = re.fullmatch(form, text, re.DOTALL)
        if found is None or labels != self.labels(len(labels)):
            raise BadInput(f"got the instruction {text[:80]!r}, expected {self.opening!r} and {self.label}1: ...")
        question, *choices = found.groups()
        answer = str(row.get("answer", ""))
        if answer not in labels:
            raise BadInput(f"got the answer {answer!r}, expected one of {', '.join(labels)}")
        return Item(
            question=question, choices=tuple(choices), gold=labels.index(answer), answer=answer, instruction=text
        )

    def item(self, question: str, choices: Sequence[str], gold: int) -> Item:
        """The item of a data set's own columns."""
        return Item(
            question=question,
            choices=tuple(choices),
            gold=gold,
            answer=self.labels(len(choices))[gold],
            instruction=self.instruction(question, choices),
        )


ANSWERS = Format(opening="Please choose the correct answer to the question: ", label="Answer")
SOLUTIONS = Format(
    opening="Please choose the correct solution to the question: ", label="Solution", between="\n\n"
)  # fmt: skip
ENDINGS = Format(opening="Please choose the correct ending to complete the given sentence: ", label="Ending")
OPTIONS = Format(
    opening="Please choose the correct answer to fill in the blank to complete the given sentence: ",
    label="Option",
    before_format=" ",
)

BOOLQ_OPENING, BOOLQ_END = "Please answer the following question with true or false, question: ", "?"
NO_YES = ("no", "yes")  # the harness's words for a BoolQ answer


def parse_boolq(row: Row) -> Item:
    """A BoolQ row; it has no passage. The question is kept without its question mark.

    Raises: BadInput for a text of another form.
    """
    text, answer = str(row.get("instruction", "")), str(row.get("answer", ""))
    found = re.fullmatch(re.escape(BOOLQ_OPENING) + r"(.*)\?\n\nAnswer format: true/false", text, re.DOTALL)
    if found is None or answer not in ("true", "false"):
        raise BadInput(f"got {text[:80]!r} with the answer {answer!r}, expected {BOOLQ_OPENING!r}... and true or false")
    return boolq_item(found[1], answer == "true", text)


def boolq_item(question: str, true: bool, instruction: str | None = None) -> Item:
    """The item of a question without its question mark."""
    return Item(
        question=question,
        choices=NO_YES,
        gold=int(true),
        answer="true" if true else "false",
        instruction=instruction or f"{BOOLQ_OPENING}{question}?\n\nAnswer format: true/false",
    )


def parse_number(row: Row) -> Item:
    """A word problem: LLM-Adapters' columns, or GSM8K's `question` and `answer` with `#### number`.

    Raises: BadInput when the answer is not a number.
    """
    question = row.get("instruction", row.get("question"))
    worked = str(row.get("answer", ""))
    number = worked.rpartition("####")[2].strip().replace(",", "")
    try:
        float(number)
    except ValueError as error:
        raise BadInput(f"got the answer {worked[-40:]!r}, expected a number, or a text with #### before it") from error
    target = worked if "####" in worked else f"#### {number}"
    return Item(question=str(question), answer=number, instruction=str(question), target=target)


LETTERS = "ABCDE"


def parse_aqua(row: Row) -> Item:
    """An AQuA row: the choices stand in the question, `Answer Choices: (A) .. (B) ..`.

    Raises: BadInput for another form.
    """
    text, answer = str(row.get("instruction", "")), str(row.get("answer", ""))
    question, marker, listed = text.partition(" Answer Choices: ")
    parts = re.split(r"\s*\(([A-E])\)\s*", listed)
    choices = tuple(part.strip() for part in parts[2::2])
    if not marker or "".join(parts[1::2]) != LETTERS[: len(choices)] or answer not in LETTERS[: len(choices)]:
        raise BadInput(f"got {text[-80:]!r} with the answer {answer!r}, expected Answer Choices: (A) .. and a letter")
    return Item(question=question, choices=choices, gold=LETTERS.index(answer), answer=answer, instruction=text)

"""The questions of tasks, from rows in LLM-Adapters' instruction format or from the columns of a data set.

An instruction is a text with question, choices and labels. `parse` splits it and `instruction` joins the parts; on
every row of the published test files the joined text is the original one.
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
    """A question of a task.

    Attributes:
        question: The question.
        choices: The choices; none if the answer is a number.
        gold: Index of the right choice, -1 without choices.
        answer: The label or number with which a generated text is compared.
        instruction: The prompt of the generate protocol.
        target: An answer with its solution, for few-shot prompts.
        subject: Subject of the question.
    """

    question: str
    choices: tuple[str, ...] = ()
    gold: int = -1
    answer: str = ""
    instruction: str = ""
    target: str = ""
    subject: str = ""

    def to_doc(self) -> dict[str, Any]:
        """The item as a row of a `datasets.Dataset`."""
        return {**asdict(self), "choices": list(self.choices)}


@dataclass(frozen=True, kw_only=True)
class Format:
    """The format of a task's instructions in LLM-Adapters.

    Attributes:
        opening: Text before the question.
        label: Name of a choice: `Answer` gives the choice "Answer1: ..." and the label "answer1".
        between: Text between two choices.
        before_format: Text between the last choice and the line with the labels.
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
        """The item of a row with an instruction and an answer.

        Raises:
            BadInput: The instruction has another form, or the answer is not one of the labels.
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
        """The item of a question, its choices and the index of the right one."""
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

BOOLQ_OPENING = "Please answer the following question with true or false, question: "
NO_YES = ("no", "yes")  # the choices of BoolQ in the harness


def parse_boolq(row: Row) -> Item:
    """The item of a BoolQ row, which has no passage; the question mark is removed from the question.

    Raises:
        BadInput: The instruction has another form, or the answer is neither true nor false.
    """
    text, answer = str(row.get("instruction", "")), str(row.get("answer", ""))
    found = re.fullmatch(re.escape(BOOLQ_OPENING) + r"(.*)\?\n\nAnswer format: true/false", text, re.DOTALL)
    if found is None or answer not in ("true", "false"):
        raise BadInput(f"got {text[:80]!r} with the answer {answer!r}, expected {BOOLQ_OPENING!r}... and true or false")
    return boolq_item(found[1], answer == "true", text)


def boolq_item(question: str, true: bool, instruction: str | None = None) -> Item:
    """The item of a BoolQ question without its question mark; `instruction` is made from it if it is None."""
    return Item(
        question=question,
        choices=NO_YES,
        gold=int(true),
        answer="true" if true else "false",
        instruction=instruction or f"{BOOLQ_OPENING}{question}?\n\nAnswer format: true/false",
    )


def parse_number(row: Row) -> Item:
    """The item of a word problem in LLM-Adapters' columns, or in GSM8K's with `#### number` in the answer.

    Raises:
        BadInput: The answer is not a number.
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
    """The item of an AQuA row, whose choices follow the question: `Answer Choices: (A) .. (B) ..`.

    Raises:
        BadInput: The row has another form.
    """
    text, answer = str(row.get("instruction", "")), str(row.get("answer", ""))
    question, marker, listed = text.partition(" Answer Choices: ")
    parts = re.split(r"\s*\(([A-E])\)\s*", listed)
    choices = tuple(part.strip() for part in parts[2::2])
    if not marker or "".join(parts[1::2]) != LETTERS[: len(choices)] or answer not in LETTERS[: len(choices)]:
        raise BadInput(f"got {text[-80:]!r} with the answer {answer!r}, expected Answer Choices: (A) .. and a letter")
    return Item(question=question, choices=choices, gold=LETTERS.index(answer), answer=answer, instruction=text)

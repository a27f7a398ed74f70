"""LLM-Adapters' generation protocol: its exact prompt, and how it finds the answer in a response.

Reference: Hu et al. 2023, "LLM-Adapters", arXiv 2304.01933, and its evaluation scripts. Their peculiarities are part of
the protocol: the indentation of the source code is in the prompt, which therefore ends in sixteen spaces; the *first*
label anywhere in the response is the answer, and its case matters; of numbers the *last* is the answer, after commas
are removed, so that a full stop after a number belongs to it and "3.5 of 10" is 10; a letter is the first capital A to
E of any word.
"""

from __future__ import annotations

import re

from owlore.data.examples import alpaca_prompt

INDENT = " " * 16
MARK = "### Response:"
OPENING = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request. "
)  # fmt: skip
TOLERANCE = 1e-3
BEAMS, LABEL_TOKENS, NUMBER_TOKENS = 4, 32, 256


def prompt(instruction: str, template: str = "compat") -> str:
    """The prompt of an instruction: "compat" is LLM-Adapters', "clean" the Alpaca prompt that `owlore train` uses."""
    if template == "clean":
        return alpaca_prompt(instruction)
    parts = ("### Instruction:\n", f"{instruction}\n\n", f"{MARK}\n", "")
    return OPENING + "\n\n" + INDENT + INDENT.join(parts)


def response(text: str) -> str:
    """The response in the text of prompt and generation: the text between the first `MARK` and the next."""
    parts = text.split(MARK)
    return parts[1].strip() if len(parts) > 1 else text.strip()


def label(text: str, answers: str) -> str:
    """The first match of the pattern `answers` in a response, or "" (which is wrong)."""
    found = re.search(answers, text)
    return found[0] if found else ""


def number(text: str) -> float:
    """The last number of a response, or infinity if there is none (which is wrong)."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else float("inf")


def right(text: str, answer: str, answers: str | None) -> bool:
    """Whether a response is right.

    Args:
        text: The response.
        answer: The right label or number.
        answers: The labels, as a pattern; None compares numbers.
    """
    if answers is None:
        return abs(float(answer) - number(text)) <= TOLERANCE
    return label(text, answers) == answer

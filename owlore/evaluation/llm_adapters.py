"""LLM-Adapters' generation protocol: its prompt to the letter, and how it finds an answer in what a model wrote.

Reference: Hu et al. 2023, "LLM-Adapters", arXiv 2304.01933, and its evaluation scripts. Their quirks are part of the
protocol: the indentation of the source code stands in the prompt, which therefore ends in sixteen spaces; the *first*
label anywhere in the response counts, with its case; of numbers the *last* counts, after commas are removed, so that a
full stop behind a number belongs to it and "3.5 of 10" is 10; a letter is the first capital A to E of any word.
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
TEMPLATES = ("compat", "clean")


def prompt(instruction: str, template: str = "compat") -> str:
    """`compat` is the prompt of LLM-Adapters' evaluation, `clean` the Alpaca prompt that `owlore train` uses."""
    if template == "clean":
        return alpaca_prompt(instruction)
    parts = ("### Instruction:\n", f"{instruction}\n\n", f"{MARK}\n", "")
    return OPENING + "\n\n" + INDENT + INDENT.join(parts)


def response(text: str) -> str:
    """The response in prompt and generation together: what stands between the first mark and the next."""
    parts = text.split(MARK)
    return parts[1].strip() if len(parts) > 1 else text.strip()


def label(text: str, answers: str) -> str:
    """The first match of `answers` in a response, or "" (which is wrong)."""
    found = re.search(answers, text)
    return found[0] if found else ""


def number(text: str) -> float:
    """The last number of a response, infinite when there is none (which is wrong)."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else float("inf")


def right(text: str, answer: str, answers: str | None) -> bool:
    """Whether a response is right. answers: the labels, or None where numbers are held against each other."""
    if answers is None:
        return abs(float(answer) - number(text)) <= TOLERANCE
    return label(text, answers) == answer

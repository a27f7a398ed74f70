"""A few rows of each task in the published formats, written for the tests, and a plain scorer to compare with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

QUESTIONS = [
    ("What is a stone made of?", ["rock", "sea water", "the wind", "old milk"], 0),
    ("Which of these can see?", ["a spoon", "a horse", "a hat", "a road"], 1),
    ("When is it dark?", ["at noon", "in the light", "at night", "in summer"], 2),
]


def _choice_rows(opening: str, label: str, between: str, before: str, choices: int) -> list[dict[str, str]]:
    rows = []
    for question, listed, gold in QUESTIONS:
        shown = between.join(f"{label}{i}: {c}" for i, c in enumerate(listed[:choices], 1))
        labels = [f"{label.lower()}{i + 1}" for i in range(choices)]
        answer = labels[gold % choices]
        rows.append({
            "instruction": f"{opening}{question}\n\n{shown}{before}Answer format: {'/'.join(labels)}",
            "input": "", "output": f"the correct answer is {answer}", "answer": answer,
        })  # fmt: skip
    return rows


ANSWER = "Please choose the correct answer to the question: "
BLANK = "Please choose the correct answer to fill in the blank to complete the given sentence: "
ENDING = "Please choose the correct ending to complete the given sentence: "
SOLUTION = "Please choose the correct solution to the question: "


def write_data(place: Path) -> Path:
    """A folder laid out as the published data, with a few rows of each task."""
    common = place / "commonsense" / "test"
    common.mkdir(parents=True)
    (place / "arithmetic" / "test").mkdir(parents=True)
    (place / "mmlu" / "test").mkdir(parents=True)
    (place / "mmlu" / "dev").mkdir(parents=True)
    (place / "text" / "wikitext-2").mkdir(parents=True)
    files: dict[str, list[dict[str, str]]] = {
        "ARC-Easy": _choice_rows(ANSWER, "Answer", " ", "\n\n", 4),
        "ARC-Challenge": _choice_rows(ANSWER, "Answer", " ", "\n\n", 4),
        "openbookqa": _choice_rows(ANSWER, "Answer", " ", "\n\n", 4),
        "social_i_qa": _choice_rows(ANSWER, "Answer", " ", "\n\n", 3),
        "piqa": _choice_rows(SOLUTION, "Solution", "\n\n", "\n\n", 2),
        "hellaswag": _choice_rows(ENDING, "Ending", " ", "\n\n", 4),
        "winogrande": [
            {"instruction": f"{BLANK}The {a} did not fit in the {b} since the _ was too {c}.\n\n"
             f"Option1: {a} Option2: {b} Answer format: option1/option2", "answer": answer}
            for a, b, c, answer in (("hat", "box", "large", "option1"), ("hat", "box", "small", "option2"),
                                    ("stone", "cup", "wide", "option1"))
        ],
        "boolq": [
            {"instruction": f"Please answer the following question with true or false, question: {q}?\n\n"
             "Answer format: true/false", "input": "", "output": "", "answer": a}
            for q, a in (("is the sea wet", "true"), ("can a stone walk", "false"), ("is it dark at night", "true"))
        ],
    }  # fmt: skip
    for name, rows in files.items():
        (common / f"{name}.json").write_text(json.dumps(rows))
    (place / "arithmetic" / "test" / "AQuA.json").write_text(json.dumps([
        {"instruction": "What is 1 and 2? Answer Choices: (A) 1 (B) 3 (C) 4 (D) 5 (E) 6", "answer": "B"},
        {"instruction": "What is 2 and 2? Answer Choices: (A) 4 (B) 3 (C) 2 (D) 5 (E) 6", "answer": "A"},
    ]))  # fmt: skip
    (place / "arithmetic" / "test" / "SVAMP.json").write_text(json.dumps([
        {"instruction": "Ten hats and two hats?", "input": "", "output": "", "answer": "12.0"},
        {"instruction": "Ten hats less two hats?", "input": "", "output": "", "answer": "8.0"},
    ]))  # fmt: skip
    header = "question,choice0,choice1,choice2,choice3,answer\n"
    dev = "".join(f"what is {i} and {i}?,{i},{2 * i},{3 * i},{4 * i},1\n" for i in range(1, 6))
    (place / "mmlu" / "dev" / "anatomy_dev.csv").write_text(header + dev)
    (place / "mmlu" / "test" / "anatomy_test.csv").write_text(
        header + '"a hand,\nas a whole, has?",one,five,two,no,1\n what is the nose for?,smell,sound,sight,taste,0\n'
    )
    (place / "text" / "wikitext-2" / "test.txt").write_text(
        " \n = The sea = \n \n The sea is wet , and it is wide . It was seen on 10 @-@ 12 days . \n"
        " \n = A hat = \n \n = = Use = = \n \n A hat is worn on the head in the sun . \n"
    )
    return place


# -- the independent scorer: one sequence at a time, no padding, no sharing ------------------------------------------


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """log p(continuation | context) by one plain forward pass of the two texts tokenised together."""
    whole = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=torch.tensor([whole])).logits[0].double(), -1)
    return float(sum(log_p[i - 1, whole[i]] for i in range(start, len(whole))))


def rolled(model: Any, ids: list[int], beginning: int, window: int) -> float:
    """Log-likelihood of `ids` where each window of `window` tokens is predicted from the token before it onwards."""
    total = 0.0
    for start in range(0, len(ids), window):
        said = ids[start : start + window]
        if start and len(said) < window:  # the last, shorter one gets the tokens before it as context
            read = ids[len(ids) - window - 1 : -1]
        else:
            read = [beginning if start == 0 else ids[start - 1], *said[:-1]]
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=torch.tensor([read])).logits[0].double(), -1)
        rows = log_p[len(read) - len(said) :]
        total += float(sum(rows[i, token] for i, token in enumerate(said)))
    return total


def best(values: list[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])


def standard_error(hits: list[int]) -> float:
    p, n = sum(hits) / len(hits), len(hits)
    return math.sqrt(p * (1 - p) / (n - 1))


def parsed(row: dict[str, str]) -> tuple[str, list[str], int]:
    """Question, choices and gold of an instruction, by splitting at its labels; a second reading beside `items`."""
    text, labels = row["instruction"].split("Answer format: ")
    labels = labels.split("/")
    if labels == ["true", "false"]:
        return text.split("question: ", 1)[1].rstrip("\n"), ["no", "yes"], int(row["answer"] == "true")
    body = text.split(": ", 1)[1]
    choices = []
    for label in reversed(labels):
        body, _, choice = body.rpartition(f"{label.capitalize()}: ")
        choices.insert(0, choice)
    separator = "\n\n" if labels[0] == "solution1" else " "
    last = " " if labels[0] == "option1" else "\n\n"
    choices = [c.removesuffix(separator) for c in choices[:-1]] + [choices[-1].removesuffix(last)]
    return body.removesuffix("\n\n"), choices, labels.index(row["answer"])

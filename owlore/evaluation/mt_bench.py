"""MT-Bench: eighty dialogues of two turns, answered in FastChat's format and graded by a model at an endpoint.

Reference: Zheng et al. 2023, "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena", arXiv 2306.05685. The files are
in FastChat's formats: questions, reference answers and judge prompts are read, answers and judgments are written line
by line, so that an interrupted run can be continued and FastChat's tools can show the result.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htsr.errors import BadInput, NotFound
from owlore.evaluation.judge import Judge

Line = dict[str, Any]
FILES = ("question.jsonl", "reference_answer_gpt-4.jsonl", "judge_prompts.jsonl")
TEMPERATURE = {  # FastChat's temperature of the answers, by category
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
OTHER_TEMPERATURE, TOP_K, NEW_TOKENS = 0.7, 50, 1024
WITH_REFERENCE = ("math", "reasoning", "coding")
UNREADABLE = -1  # FastChat's score of a judgment without a rating; here it is left out of every mean


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The data of MT-Bench.

    Attributes:
        questions: The questions.
        references: Reference answers by the id of their question.
        prompts: Judge prompts by name.
        sha256: Digest of each file by its name.
    """

    questions: list[Line]
    references: dict[int, Line]
    prompts: dict[str, Line]
    sha256: dict[str, str]


def read_bench(data_dir: str | Path | None) -> Bench:
    """Read the three files in `data_dir`/mt_bench, or in `data_dir`.

    Raises:
        NotFound: They are not there.
        BadInput: A line is not JSON.
    """
    directories = [] if data_dir is None else [Path(data_dir) / "mt_bench", Path(data_dir)]
    for directory in directories:
        if (directory / FILES[0]).is_file():
            questions, references, prompts = (_lines(directory / name) for name in FILES)
            return Bench(
                questions=questions,
                references={line["question_id"]: line for line in references},
                prompts={line["name"]: line for line in prompts},
                sha256={name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in FILES},
            )
    where = f"below {data_dir}" if data_dir is not None else "without --data-dir"
    raise NotFound(f"mt_bench: no questions {where}; looked for mt_bench/{', mt_bench/'.join(FILES)} (FastChat's)")


def answer_all(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Line],
    *,
    model_id: str,
    path: Path,
    max_new_tokens: int = NEW_TOKENS,
    done: Callable[[], None] = lambda: None,
) -> list[Line]:
    """Answer both turns of every question that has no answer in a file yet.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        questions: The questions.
        model_id: Name of the model in the file.
        path: The file of answers, to which new ones are appended.
        max_new_tokens: Largest number of tokens of an answer.
        done: Called after each question.

    Returns:
        The answers to the questions, in their order.
    """
    known = {line["question_id"]: line for line in (_lines(path) if path.is_file() else [])}
    path.parent.mkdir(parents=True, exist_ok=True)
    for question in questions:
        if question["question_id"] not in known:
            turns = _answers(model, tokenizer, question, max_new_tokens)
            key = f"{model_id}/{question['question_id']}/{turns}"
            line = {
                "question_id": question["question_id"],
                "answer_id": hashlib.sha256(key.encode()).hexdigest()[:22],
                "model_id": model_id,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": time.time(),
            }
            _append(path, line)
            known[question["question_id"]] = line
        done()
    return [known[question["question_id"]] for question in questions]


def _answers(model: Any, tokenizer: Any, question: Line, max_new_tokens: int) -> list[str]:
    from owlore.generate import continue_ids

    temperature = TEMPERATURE.get(question["category"], OTHER_TEMPERATURE)
    dialogue: list[tuple[str, str]] = []
    turns = []
    for asked in question["turns"]:
        dialogue.append(("user", asked))
        text = continue_ids(
            model, tokenizer, dialogue_ids(dialogue, tokenizer), max_new_tokens=max_new_tokens, temperature=temperature,
            seed=0, top_k=TOP_K, what=f"question {question['question_id']}",
        )  # fmt: skip
        turns.append(text.strip())
        dialogue.append(("assistant", turns[-1]))
    return turns


def dialogue_ids(messages: Sequence[tuple[str, str]], tokenizer: Any) -> list[int]:
    """Token ids of a dialogue up to the next answer, in the chat template or else in the Alpaca prompt."""
    from owlore.data.templates import plain_dialogue
    from owlore.data.tokenise import leading_tokens

    if getattr(tokenizer, "chat_template", None):
        shown = [{"role": role, "content": text} for role, text in messages]
        text = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = leading_tokens(tokenizer)
    for piece in plain_dialogue((*messages, ("assistant", ""))).pieces:
        ids = ids + tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        if piece.ends and tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
    return ids


# -- judging -----------------------------------------------------------------------------------------------------------


def judge_all(
    bench: Bench,
    questions: Sequence[Line],
    answers: Sequence[Line],
    judge: Judge,
    *,
    path: Path,
    done: Callable[[], None] = lambda: None,
) -> list[Line]:
    """Have every turn judged that has no judgment in a file yet.

    Args:
        bench: Judge prompts and reference answers.
        questions: The questions.
        answers: Their answers, in the same order.
        judge: The judge.
        path: The file of judgments, to which new ones are appended.
        done: Called after each turn.

    Returns:
        The judgments of both turns of each answer.
    """
    known = {(line["question_id"], line["turn"], line.get("answer_id")): line
             for line in (_lines(path) if path.is_file() else [])}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    made = []
    for question, answer in zip(questions, answers, strict=True):
        for turn in (1, 2):
            key = (question["question_id"], turn, answer["answer_id"])
            if key not in known:
                prompt = prompt_for(bench, question, turn)
                user = fill(prompt["prompt_template"], _fields(bench, question, answer, turn))
                judgment = judge.ask(prompt["system_prompt"], user)
                score = rating(judgment)
                known[key] = {
                    "question_id": question["question_id"], "model": answer["model_id"],
                    "judge": [judge.model, prompt["name"]], "user_prompt": user, "judgment": judgment,
                    "score": UNREADABLE if score is None else score, "turn": turn, "tstamp": time.time(),
                    "answer_id": answer["answer_id"],
                }  # fmt: skip
                _append(path, known[key])
            made.append(known[key])
            done()
    return made


def prompt_for(bench: Bench, question: Line, turn: int) -> Line:
    """FastChat's judge prompt for a single answer, with the reference answer for mathematics, reasoning and code.

    Raises:
        BadInput: The files have no such prompt, or no reference answer.
    """
    reference = question["category"] in WITH_REFERENCE
    name = ("single-math-v1" if reference else "single-v1") + ("-multi-turn" if turn == 2 else "")
    if name not in bench.prompts:
        raise BadInput(f"mt_bench: judge_prompts.jsonl has no {name}; expected FastChat's file")
    if reference and question["question_id"] not in bench.references:
        raise BadInput(f"mt_bench: no reference answer to question {question['question_id']}, which its judge needs")
    return bench.prompts[name]


def _fields(bench: Bench, question: Line, answer: Line, turn: int) -> dict[str, str]:
    turns = answer["choices"][0]["turns"]
    fields = {"question": question["turns"][0], "answer": turns[0]}
    if turn == 2:
        fields = {"question_1": question["turns"][0], "question_2": question["turns"][1], "answer_1": turns[0],
                  "answer_2": turns[1]}  # fmt: skip
    if question["category"] in WITH_REFERENCE:
        known = bench.references[question["question_id"]]["choices"][0]["turns"]
        fields |= {"ref_answer_1": known[0], "ref_answer_2": known[1]}
    return fields


def fill(template: str, fields: dict[str, str]) -> str:
    """The template with each `{name}` replaced by its text; unlike `str.format`, other braces are left as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: fields.get(found[1], found[0]), template)


def rating(judgment: str) -> float | None:
    """The rating: the number in [[double brackets]], else in [single ones], else None."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", judgment) or re.search(r"\[(\d+\.?\d*)\]", judgment)
    return float(found[1]) if found else None


def scores(questions: Sequence[Line], judgments: Sequence[Line]) -> dict[str, Any]:
    """Mean scores over all judgments, by turn and by category; judgments without a rating are counted and left out."""
    category = {question["question_id"]: question["category"] for question in questions}
    read = [line for line in judgments if line["score"] != UNREADABLE]

    def mean(lines: list[Line]) -> float | None:
        return statistics.fmean(line["score"] for line in lines) if lines else None

    names = dict.fromkeys(category.values())
    return {
        "score": mean(read),
        "first_turn": mean([line for line in read if line["turn"] == 1]),
        "second_turn": mean([line for line in read if line["turn"] == 2]),
        "categories": {name: mean([one for one in read if category[one["question_id"]] == name]) for name in names},
        "judged": len(read),
        "without_rating": len(judgments) - len(read),
    }


def _lines(path: Path) -> list[Line]:
    """The objects of a JSON-lines file; an incomplete last line, from a run that was killed, is removed.

    Raises:
        NotFound: There is no such file.
        BadInput: Another line is not JSON.
    """
    if not path.is_file():
        raise NotFound(f"{path}: no such file; MT-Bench needs {', '.join(FILES)}")
    lines = path.read_text(encoding="utf-8").splitlines()
    made = []
    for number, line in enumerate(lines, 1):
        try:
            made.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not path.read_text(encoding="utf-8").endswith("\n"):
                path.write_text("".join(f"{one}\n" for one in lines[:-1]), encoding="utf-8")
                break
            raise BadInput(
                f"{path}: line {number} is not JSON ({error.msg}); expected FastChat's JSON lines"
            ) from error
    return made


def _append(path: Path, line: Line) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")

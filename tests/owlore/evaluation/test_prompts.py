"""Rows are read as the published sets mean them, and prompts are the harness's and LLM-Adapters' to the letter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from eval_samples import parsed, write_data

from htsr.errors import BadInput, NotFound, UsageError
from owlore.evaluation import items, llm_adapters
from owlore.evaluation.sources import read_task
from owlore.evaluation.subjects import SUBJECTS
from owlore.evaluation.tasks import GROUPS, TASKS, find_tasks

FORMATS = {
    "piqa": items.SOLUTIONS, "social_i_qa": items.ANSWERS, "hellaswag": items.ENDINGS, "winogrande": items.OPTIONS,
    "ARC-Easy": items.ANSWERS, "ARC-Challenge": items.ANSWERS, "openbookqa": items.ANSWERS,
}  # fmt: skip


def test_every_published_row_is_read_and_put_together_again(shared: Path) -> None:
    for name, form in FORMATS.items():
        for row in json.loads((shared / "data" / "commonsense" / "test" / f"{name}.json").read_text()):
            item = form.parse(row)
            assert form.instruction(item.question, item.choices) == row["instruction"]
            assert (item.question, list(item.choices), item.gold) == parsed(row)
    for row in json.loads((shared / "data" / "commonsense" / "test" / "boolq.json").read_text()):
        item = items.parse_boolq(row)
        assert items.boolq_item(item.question, item.gold == 1) == item
    for name, read in (("AQuA", items.parse_aqua), ("SVAMP", items.parse_number), ("mawps", items.parse_number)):
        for row in json.loads((shared / "data" / "arithmetic" / "test" / f"{name}.json").read_text()):
            assert read(row).answer == row["answer"]


def test_a_choice_that_holds_the_next_label_in_its_text_is_read_by_the_first_label() -> None:
    row = {"instruction": "Please choose the correct answer to the question: Which?\n\nAnswer1: one Answer2: two\n\n"
           "Answer format: answer1/answer2", "answer": "answer2"}  # fmt: skip
    item = items.ANSWERS.parse(row)
    assert (item.question, item.choices, item.gold) == ("Which?", ("one", "two"), 1)


@pytest.mark.parametrize("row", [
    {"instruction": "What?", "answer": "answer1"},
    {"instruction": "Please choose the correct answer to the question: Which?\n\nAnswer1: a Answer2: b\n\n"
     "Answer format: answer1/answer2", "answer": "answer3"},
])  # fmt: skip
def test_a_row_of_another_form_is_bad_input(row: dict[str, str]) -> None:
    with pytest.raises(BadInput, match="got the"):
        items.ANSWERS.parse(row)


def test_hub_rows_become_the_published_instruction() -> None:
    hub = {"arc_easy": {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
           "piqa": {"goal": "Do it", "sol1": "so", "sol2": "not so", "label": 1},
           "social_iqa": {"context": "He ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c",
                          "label": "2"},
           "winogrande": {"sentence": "The _ is wet.", "option1": "sea", "option2": "sun", "answer": "2"},
           "openbookqa": {"question_stem": "It is", "choices": {"text": ["x", "y"], "label": ["A", "B"]},
                          "answerKey": "B "},
           "hellaswag": {"activity_label": "Sea", "ctx_a": "He swims.", "ctx_b": "then he", "endings": ["a", "b"],
                         "label": "1"},
           "boolq_nopassage": {"question": "is it wet", "label": 1},
           "aqua": {"question": "2 and 2?", "options": ["A)1", "B)4"], "correct": "B"},
           "svamp": {"Body": "Two hats.", "Question": "How many?", "Answer": 2.0},
           "mmlu_anatomy": {"question": " What? ", "choices": ["a", "b", "c", "d"], "answer": 1}}  # fmt: skip
    for name, row in hub.items():
        task = TASKS[name]
        assert task.hub is not None
        item = task.hub.item(row)
        assert item.gold == (1 if item.choices else -1), name
        if item.instruction and name != "svamp":
            assert task.parse({"instruction": item.instruction, "answer": item.answer}) == item
    assert TASKS["hellaswag"].hub.item(hub["hellaswag"]).question == "Sea: He swims. Then he"


def test_few_shot_prompts_of_mmlu_are_the_harness_own(tmp_path: Path) -> None:
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    from owlore.evaluation.harness import harness_task

    data = write_data(tmp_path / "data")
    task = TASKS["mmlu_anatomy"]
    asked = read_task(task, data_dir=data, limit=None, shots=None, shuffle=None)
    ours = harness_task(task, asked, "likelihood")
    ours.build_all_requests(limit=None, rank=0, world_size=1)

    place = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    config = yaml.safe_load((place / "_default_template_yaml").read_text())
    config |= yaml.safe_load((place / "mmlu_anatomy.yaml").read_text())
    del config["include"]
    rows = {"test": asked.items, "dev": asked.shots}
    config["custom_dataset"] = lambda **_: {
        split: Dataset.from_list([{"question": i.question, "choices": list(i.choices), "answer": i.gold} for i in part])
        for split, part in rows.items()
    }
    theirs = ConfigurableTask(config=config | {"num_fewshot": 5})
    theirs.build_all_requests(limit=None, rank=0, world_size=1)
    assert [one.args for one in ours.instances] == [one.args for one in theirs.instances]
    assert len(ours.instances) == 8
    assert (
        ours.instances[0]
        .args[0]
        .startswith("The following are multiple choice questions (with answers) about anatomy.\n\n")
    )


def test_there_are_57_subjects_and_each_has_local_rows(shared: Path) -> None:
    assert len(SUBJECTS) == len(set(SUBJECTS)) == 57
    rows = 0
    for name in GROUPS["mmlu"]:
        asked = read_task(TASKS[name], data_dir=shared / "data", limit=None, shots=None, shuffle=None)
        rows += len(asked.items)
        assert len(asked.shots) == 5
    assert rows == 14042


def test_the_generate_prompt_is_llm_adapters_to_the_letter() -> None:
    assert llm_adapters.prompt("Is it?\n\nAnswer format: true/false") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
        "                ### Instruction:\n"
        "                Is it?\n\nAnswer format: true/false\n\n"
        "                ### Response:\n"
        "                "
    )
    assert llm_adapters.prompt("Is it?", "clean").endswith("### Instruction:\nIs it?\n\n### Response:\n")


@pytest.mark.parametrize(("text", "answers", "answer", "right"), [
    ("the correct answer is answer3", "answer1|answer2|answer3|answer4|answer5", "answer3", True),
    ("answer2, no: answer3", "answer1|answer2|answer3|answer4|answer5", "answer3", False),  # the first one counts
    ("answer12", "answer1|answer2|answer3|answer4|answer5", "answer1", True),  # also inside a longer word
    ("The correct answer is True", "true|false", "true", False),  # case counts
    ("untrue", "true|false", "true", True),
    ("", "true|false", "true", False),
    ("Because the answer is C", "A|B|C|D|E", "C", False),  # the B of Because
    ("the answer is C", "A|B|C|D|E", "C", True),
    ("ending4", "ending1|ending2|ending3|ending4", "ending4", True),
])  # fmt: skip
def test_labels_are_found_as_llm_adapters_finds_them(text: str, answers: str, answer: str, right: bool) -> None:
    assert llm_adapters.right(text, answer, answers) is right


@pytest.mark.parametrize(("text", "answer", "right"), [
    ("so 3 + 4 = 7.", "7.0", True),  # the full stop belongs to the number
    ("1,250 dollars", "1250", True),
    ("it is 7, as 7 = 3 + 4", "7", False),  # the last number counts
    ("10 - 12 = -2", "-2", True),
    ("10-12", "-12", True),  # a minus between two numbers belongs to the second
    ("0.3334", "0.333", True),  # within a thousandth
    ("0.3345", "0.333", False),
    ("none", "1", False),
    ("3.5 of 10", "10", True),
])  # fmt: skip
def test_numbers_are_found_as_llm_adapters_finds_them(text: str, answer: str, right: bool) -> None:
    assert llm_adapters.right(text, answer, None) is right


def test_a_response_ends_where_the_model_begins_another_one() -> None:
    prompt = llm_adapters.prompt("Is it?")
    assert llm_adapters.response(prompt + "true\n\n### Response:\nfalse") == "true"
    assert llm_adapters.response(prompt + "  answer1 ") == "answer1"


def test_unknown_tasks_name_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="did you mean arc_easy"):
        find_tasks(["arc_esay"])
    with pytest.raises(UsageError, match="generate has no prompt for perplexity"):
        find_tasks(["perplexity"], "generate")
    assert [task[0].name for task in find_tasks(["boolq", "siqa", "obqa"]).values()] == [
        "boolq_nopassage", "social_iqa", "openbookqa",
    ]  # fmt: skip


def test_missing_data_name_the_files_that_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"commonsense/test/piqa\.json.*piqa\.json"):
        read_task(TASKS["piqa"], data_dir=tmp_path, limit=None, shots=None, shuffle=None)
    data = write_data(tmp_path / "data")
    with pytest.raises(NotFound, match=r"few-shot examples: no data.*commonsense/train/piqa\.json"):
        read_task(TASKS["piqa"], data_dir=data, limit=None, shots=2, shuffle=None)


def test_the_limit_takes_the_first_rows_and_the_shuffle_comes_before_it(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")

    def questions(**settings: Any) -> list[str]:
        chosen = {"limit": None, "shuffle": None, **settings}
        asked = read_task(TASKS["arc_easy"], data_dir=data, shots=None, **chosen)
        return [item.question for item in asked.items]

    assert questions(limit=2) == questions()[:2]
    assert sorted(questions(shuffle=1)) == sorted(questions())
    assert questions(shuffle=1, limit=1) == questions(shuffle=1)[:1]
    assert any(questions(shuffle=seed) != questions() for seed in range(4))

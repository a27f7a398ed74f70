"""Our tasks as tasks of lm-evaluation-harness, with its prompts, few-shot contexts and metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from htsr.console import quiet_libraries
from owlore.evaluation import llm_adapters
from owlore.evaluation.items import Item
from owlore.evaluation.sources import Asked
from owlore.evaluation.tasks import Task

Doc = dict[str, Any]
MEAN = {"aggregation": "mean", "higher_is_better": True}
NUMBER_STOPS = ("Question:", "</s>", "<|im_end|>")


def run_tasks(scorer: Any, asked: dict[str, tuple[Task, Asked]], protocol: str, template: str) -> dict[str, Any]:
    """Evaluate tasks with the harness.

    Args:
        scorer: The model, as a `Scorer`.
        asked: Tasks and their items by name.
        protocol: "likelihood" or "generate".
        template: Prompt of the generate protocol, "compat" or "clean".

    Returns:
        The harness's `results` by task, and `samples` with the scores of each row.
    """
    tasks = {name: harness_task(task, what, protocol, template) for name, (task, what) in asked.items()}
    with quiet_libraries(prints=True):
        found: dict[str, Any] = evaluate(lm=scorer, task_dict=tasks, bootstrap_iters=0, log_samples=True)
    return found


def harness_task(task: Task, asked: Asked, protocol: str, template: str = "compat") -> ConfigurableTask:
    """The harness's task with these items; the arguments are those of `run_tasks`."""
    settings = _generated(task, template) if protocol == "generate" else LIKELIHOOD[task.kind](task)
    shots = [item.to_doc() for item in asked.shots]
    config = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list([item.to_doc() for item in asked.items])},
        "test_split": "test",
        "description": task.description,
        "num_fewshot": 0 if protocol == "generate" else len(shots),
        "fewshot_config": {"sampler": "first_n", "samples": shots},
        **settings,
    }
    with quiet_libraries(prints=True):
        return ConfigurableTask(config=config)


# -- likelihood --------------------------------------------------------------------------------------------------------


def _choice(task: Task) -> dict[str, Any]:
    metrics = [{"metric": "acc", **MEAN}] + [{"metric": "acc_norm", **MEAN}] * task.normalised
    return {
        "output_type": "multiple_choice",
        "doc_to_text": _on_item(task.prompt),
        "doc_to_choice": lambda doc: doc["choices"],
        "doc_to_target": lambda doc: doc["gold"],
        "metric_list": metrics,
    }


def _letter(task: Task) -> dict[str, Any]:
    return _choice(task) | {"doc_to_choice": lambda doc: list("ABCDE")[: len(doc["choices"])]}


def _partial(task: Task) -> dict[str, Any]:
    """The context is the sentence up to the blank with each option in it; the rest of the sentence is scored."""
    del task
    return {
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: doc["gold"],
        "doc_to_choice": lambda doc: [doc["question"].partition("_")[0] + choice for choice in doc["choices"]],
        "doc_to_target": lambda doc: doc["question"].partition("_")[2].strip(),
        "metric_list": [{"metric": "acc", **MEAN}],
    }


def _number(task: Task) -> dict[str, Any]:
    """Greedy generation as in the harness's gsm8k.

    `acc` uses its flexible extraction (the last number), `acc_strict` the number after ####.
    """

    def results(doc: Doc, texts: Sequence[str]) -> dict[str, float]:
        numbers = [a or b for a, b in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", texts[0])]
        strict = re.findall(r"#### (\-?[0-9\.\,]+)", texts[0])
        return {
            "acc": float(bool(numbers) and same_number(numbers[-1], doc["answer"])),
            "acc_strict": float(bool(strict) and same_number(strict[0], doc["answer"])),
        }

    return {
        "output_type": "generate_until",
        "doc_to_text": _on_item(task.prompt),
        "doc_to_target": lambda doc: doc["target"],
        "process_results": results,
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_strict", **MEAN}],
        "generation_kwargs": {"until": list(NUMBER_STOPS), "do_sample": False, "max_gen_toks": 256},
    }


def same_number(text: str, answer: str) -> bool:
    """Whether a text is the number `answer` by value, ignoring a dollar sign, thousands separators and a full stop."""
    try:
        return abs(float(text.replace(",", "").replace("$", "").rstrip(".")) - float(answer)) <= llm_adapters.TOLERANCE
    except ValueError:
        return False


def _text(task: Task) -> dict[str, Any]:
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    del task
    page = lambda doc: {"page": doc["question"]}  # noqa: E731 - the harness's own functions read this key
    perplexities = [("word_perplexity", "weighted_perplexity"), ("byte_perplexity", "weighted_perplexity"),
                    ("bits_per_byte", "bits_per_byte")]  # fmt: skip
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": lambda doc: wikitext_detokenizer(page(doc)),
        "process_results": lambda doc, found: process_results(page(doc), found),
        "metric_list": [{"metric": m, "aggregation": a, "higher_is_better": False} for m, a in perplexities],
    }


LIKELIHOOD: dict[str, Callable[[Task], dict[str, Any]]] = {
    "choice": _choice,
    "letter": _letter,
    "partial": _partial,
    "number": _number,
    "text": _text,
}


# -- generate ----------------------------------------------------------------------------------------------------------


def _generated(task: Task, template: str) -> dict[str, Any]:
    """LLM-Adapters' protocol: four beams; the first label or the last number of the response is the answer."""
    numbers = task.kind == "number"
    arithmetic = numbers or task.answers == "A|B|C|D|E"

    def results(doc: Doc, texts: Sequence[str]) -> dict[str, float]:
        response = llm_adapters.response(llm_adapters.prompt(doc["instruction"], template) + texts[0])
        return {"acc": float(llm_adapters.right(response, doc["answer"], None if numbers else task.answers))}

    length = llm_adapters.NUMBER_TOKENS if arithmetic else llm_adapters.LABEL_TOKENS
    return {
        "output_type": "generate_until",
        "doc_to_text": lambda doc: llm_adapters.prompt(doc["instruction"], template),
        "doc_to_target": lambda doc: doc["answer"],
        "process_results": results,
        "metric_list": [{"metric": "acc", **MEAN}],
        "generation_kwargs": {
            "until": [], "do_sample": False, "num_beams": llm_adapters.BEAMS, "max_gen_toks": length,
        },
    }  # fmt: skip


def _on_item(prompt: Callable[[Item], str]) -> Callable[[Doc], str]:
    return lambda doc: prompt(Item(**{**doc, "choices": tuple(doc["choices"])}))


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(samples: Sequence[dict[str, Any]], results: dict[str, Any]) -> dict[str, Any]:
    """Means over the rows with standard errors, and weighted figures (perplexities) as the harness computed them.

    Args:
        samples: The harness's samples, one for each row.
        results: The harness's results of the task.
    """
    made: dict[str, Any] = {}
    for metric in samples[0]["metrics"] if samples else ():
        values = [sample[metric] for sample in samples]
        if isinstance(values[0], tuple | list):
            made[metric] = float(results[f"{metric},none"])
            continue
        made[metric] = math.fsum(values) / len(values)
        made[f"{metric}_stderr"] = standard_error(values)
    return made | {"n": len(samples)}


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, s / sqrt(n) with n - 1 degrees of freedom in s; None for one value."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)

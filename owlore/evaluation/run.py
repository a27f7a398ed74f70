"""Evaluation of a model on tasks; each result is kept, so that an interrupted evaluation can be continued."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from htsr import files
from htsr.console import progress
from htsr.errors import HtsrError, UsageError
from owlore.evaluation.sources import Asked, read_task
from owlore.evaluation.tasks import PROTOCOLS, Task, find_tasks

SCHEMA = "owlore-eval/1"


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    protocol: str = "likelihood",
    limit: int | None = None,
    shots: int | None = None,
    shuffle: int | None = None,
    template: str = "compat",
    budget: int = 1024,
    identity: Any = None,
    store: Path | None = None,
    rows: bool = False,
    notify: Callable[[str], None] = lambda message: None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Evaluate a loaded model on tasks.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups of tasks, see `owlore.evaluation.tasks`.
        data_dir: Directory with the tasks' files; None reads them from the Hugging Face Hub.
        protocol: "likelihood" scores the choices, "generate" is LLM-Adapters' protocol.
        limit: Number of rows of each task, and of each subject of MMLU; None takes all.
        shots: Number of few-shot examples; None takes the task's default.
        shuffle: Seed by which the rows are shuffled first; None does not shuffle.
        template: Prompt of the generate protocol: "compat" is LLM-Adapters', "clean" that of `owlore train`.
        budget: Number of tokens of a forward pass.
        identity: A JSON value that identifies the weights, such as their digest; None stores no results.
        store: Directory in which results are kept, by everything they depend on; None keeps none.
        rows: Whether the result has the outcome of each row.
        notify: Called with a message for each finished task.
        quiet: Whether to show no progress bar.

    Returns:
        The figures of each task with standard errors and counts, the settings, data digests and versions.

    Raises:
        UsageError: A task or the protocol is unknown.
        NotFound: Data are missing.
        BadInput: A row has another form.
        HtsrError: lm-evaluation-harness is not installed.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"--protocol got {protocol!r}, expected one of {', '.join(PROTOCOLS)}")
    asked = read_tasks(tasks, data_dir=data_dir, protocol=protocol, limit=limit, shots=shots, shuffle=shuffle)
    from owlore.evaluation.scorer import Scorer

    total = sum(_requests(task, what, protocol) for parts in asked.values() for task, what in parts.values())
    with progress(total, "evaluating", "request", quiet=quiet) as bar:
        scorer = Scorer(model, tokenizer, budget=budget, advance=lambda done: bar.update(done))
        results: dict[str, Any] = {}
        settings = {"protocol": protocol, "limit": limit, "shuffle": shuffle}
        if protocol == "generate":
            settings["template"] = template
        for name, parts in asked.items():
            key = _key(name, parts, settings, identity, scorer)
            kept = None if store is None or identity is None else store / f"{name}-{key}.json"
            if kept is not None and kept.is_file():
                results[name] = json.loads(kept.read_text())
                notify(f"{name}: read from an earlier evaluation")
                bar.update(sum(_requests(task, what, protocol) for task, what in parts.values()))
                continue
            bar.set_postfix_str(name)
            results[name] = _one(scorer, name, parts, protocol, template)
            if kept is not None:
                files.write_text(kept, json.dumps(results[name], allow_nan=False))
            notify(f"{name}: {_headline(results[name])}")
    if not rows:
        results = {name: {k: v for k, v in result.items() if k != "rows"} for name, result in results.items()}
    return {
        "schema": SCHEMA,
        "tasks": results,
        **settings,
        "shots": shots,
        "scoring": "tree" if scorer.takes_trees else "padded batches",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(scorer.device),
        "versions": _versions(),
    }


def read_tasks(
    names: Sequence[str],
    *,
    data_dir: str | Path | None,
    protocol: str,
    limit: int | None,
    shots: int | None,
    shuffle: int | None,
) -> dict[str, dict[str, tuple[Task, Asked]]]:
    """The items of tasks, with the arguments and errors of `evaluate`.

    Returns:
        For each name the task, or the tasks of the group, by name with their items.
    """
    groups = find_tasks(names, protocol)
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise HtsrError(
            "evaluation needs lm-evaluation-harness: python -m pip install 'htsr-owlore[eval]' (or lm-eval datasets)"
        ) from error
    chosen: dict[str, Any] = {"data_dir": data_dir, "limit": limit, "shuffle": shuffle}
    chosen["shots"] = 0 if protocol == "generate" else shots
    return {
        name: {task.name: (task, read_task(task, **chosen)) for task in members} for name, members in groups.items()
    }


def _one(scorer: Any, name: str, parts: dict[str, tuple[Task, Asked]], protocol: str, template: str) -> dict[str, Any]:
    """The result of a task, or of a group: the figures over all rows of its parts, and those of each part."""
    from owlore.evaluation.harness import figures, run_tasks

    started, processor = time.perf_counter(), time.process_time()
    found = run_tasks(scorer, parts, protocol, template)
    single = len(parts) == 1
    samples = [sample for part in parts for sample in found["samples"][part]]
    any_part = next(iter(parts))
    result = figures(samples, found["results"][any_part])
    first, what = parts[any_part]
    result |= {
        "task": first.name if single else name,
        "shots": len(what.shots),
        "data": what.provenance if single else {part: asked.provenance for part, (_, asked) in parts.items()},
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - processor,
    }
    if first.kind == "text":
        result |= {"window": scorer.rolling, **_by_token(samples, scorer)}
    if first.note:
        result["note"] = first.note
    if not single:
        result["parts"] = {part: figures(found["samples"][part], found["results"][part]) for part in parts}
    result["rows"] = [{metric: sample[metric] for metric in sample["metrics"]} for sample in samples]
    return result


def _by_token(samples: Sequence[dict[str, Any]], scorer: Any) -> dict[str, Any]:
    """Perplexity per token of this tokenizer, from the likelihoods of the samples."""
    tokens = sum(len(scorer.tok_encode(sample["arguments"][0][0])) for sample in samples)
    total = math.fsum(sample["word_perplexity"][0] for sample in samples)
    return {"perplexity": math.exp(-total / tokens), "tokens": tokens}


def _requests(task: Task, asked: Asked, protocol: str) -> int:
    if protocol == "generate" or task.kind in ("number", "text"):
        return len(asked.items)
    return sum(len(item.choices) for item in asked.items)


def _key(name: str, parts: Any, settings: dict[str, Any], identity: Any, scorer: Any) -> str:
    """A digest of everything that a result depends on."""
    data = {part: asked.provenance for part, (_, asked) in parts.items()}
    dtype = str(next(scorer.model.parameters()).dtype)
    what = [SCHEMA, name, data, settings, identity, dtype, scorer.takes_trees, scorer.max_length, _versions()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _headline(result: dict[str, Any]) -> str:
    if "acc" not in result:
        return f"perplexity {result['perplexity']:.2f} a token, {result['word_perplexity']:.2f} a word"
    error = result["acc_stderr"]
    return f"acc {result['acc']:.4f}" + (f" +- {error:.4f}" if error is not None else "") + f" of {result['n']}"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("htsr-owlore", "lm_eval", "torch", "transformers")}

"""`owlore eval`: tasks one after another, each kept when it is done, so that an interrupted evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
    """Figures of a loaded model on `tasks`, with standard errors, counts, data digests and versions.

    data_dir: where the tasks' files lie; None is the Hub. limit: the first rows of each task (of each subject of
    MMLU), after a shuffle by the seed `shuffle` when there is one. shots: few-shot examples, the task's own number when
    None. budget: tokens of a forward pass. store: where finished tasks are kept, and found again by what they depend
    on; identity: what names the weights there. rows: each row's outcome too.

    Raises: UsageError (unknown task or protocol), NotFound (data), BadInput (rows of another form), HtsrError without
    the harness.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"--protocol got {protocol!r}, expected one of {', '.join(PROTOCOLS)}")
    groups = find_tasks(tasks, protocol)
    asked = {
        name: {task.name: (task, _read(task, data_dir, limit, shots, shuffle, protocol)) for task in members}
        for name, members in groups.items()
    }
    _need_harness()
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
                notify(f"{name}: found from an earlier evaluation")
                bar.update(sum(_requests(task, what, protocol) for task, what in parts.values()))
                continue
            bar.set_postfix_str(name)
            results[name] = _one(scorer, name, parts, protocol, template)
            if kept is not None:
                _keep(kept, results[name])
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


def check_data(names: Sequence[str], *, protocol: str, **chosen: Any) -> None:
    """Read the rows of the tasks once, so that missing or wrong data are said before a model is loaded.

    Raises: as `evaluate`.
    """
    _need_harness()
    for members in find_tasks(names, protocol).values():
        for task in members:
            _read(task, chosen["data_dir"], chosen["limit"], chosen["shots"], chosen["shuffle"], protocol)


def _read(
    task: Task, data_dir: str | Path | None, limit: int | None, shots: int | None, shuffle: int | None, protocol: str
) -> Asked:
    return read_task(
        task, data_dir=data_dir, limit=limit, shots=0 if protocol == "generate" else shots, shuffle=shuffle
    )


def _one(scorer: Any, name: str, parts: dict[str, tuple[Task, Asked]], protocol: str, template: str) -> dict[str, Any]:
    """The result of a task, or of a group: over all rows of its parts, with each part's figures beside."""
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
    """Perplexity a token of this tokenizer, from the same likelihoods."""
    import math

    tokens = sum(len(scorer.tok_encode(sample["arguments"][0][0])) for sample in samples)
    total = math.fsum(sample["word_perplexity"][0] for sample in samples)
    return {"perplexity": math.exp(-total / tokens), "tokens": tokens}


def _requests(task: Task, asked: Asked, protocol: str) -> int:
    if protocol == "generate" or task.kind in ("number", "text"):
        return len(asked.items)
    return sum(len(item.choices) for item in asked.items)


def _key(name: str, parts: Any, settings: dict[str, Any], identity: Any, scorer: Any) -> str:
    """Of everything that a result depends on."""
    data = {part: asked.provenance for part, (_, asked) in parts.items()}
    dtype = str(next(scorer.model.parameters()).dtype)
    what = [SCHEMA, name, data, settings, identity, dtype, scorer.takes_trees, scorer.max_length, _versions()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _keep(path: Path, result: dict[str, Any]) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, allow_nan=False))
    temporary.replace(path)


def _headline(result: dict[str, Any]) -> str:
    if "acc" not in result:
        return f"perplexity {result['perplexity']:.2f} a token, {result['word_perplexity']:.2f} a word"
    error = result["acc_stderr"]
    return f"acc {result['acc']:.4f}" + (f" +- {error:.4f}" if error is not None else "") + f" of {result['n']}"


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise HtsrError(
            "evaluation needs lm-evaluation-harness: python -m pip install 'htsr-owlore[eval]' (or lm-eval datasets)"
        ) from error


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("htsr-owlore", "lm_eval", "torch", "transformers")}

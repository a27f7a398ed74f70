"""`owlore eval`: parse, load the model, evaluate, print. No heavy package is imported before the command runs."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Any

import click

from htsr import console, files
from htsr.errors import UsageError

MT_BENCH = "mt_bench"


@click.command(name="eval", cls=console.Command)
@click.argument("model")
@click.option(
    "--tasks", required=True, metavar="NAME,...",
    help="boolq, piqa, siqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa (or commonsense for these "
    "eight), mmlu or mmlu_SUBJECT, gsm8k, svamp, mawps, aqua, perplexity, mt_bench.",
)  # fmt: skip
@click.option("--data-dir", metavar="DIR", help="Folder with the tasks' files. [default: the Hugging Face Hub]")
@click.option(
    "--protocol", type=console.Choice(["likelihood", "generate"]), default="likelihood", show_default=True,
    help="Likelihood of each choice, or LLM-Adapters' prompt, four beams and its search for the answer.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N rows of each task. [default: all]")
@click.option("--shuffle", type=click.IntRange(0), metavar="SEED", help="Shuffle the rows by this seed first.")
@click.option("--shots", type=click.IntRange(0), metavar="N", help="Few-shot examples. [default: the task's own]")
@click.option(
    "--template", type=console.Choice(["compat", "clean"]), default="compat", show_default=True,
    help="Of the generate protocol: LLM-Adapters' prompt to the letter, or the one that `owlore train` uses.",
)  # fmt: skip
@click.option("--budget", type=click.IntRange(1), default=1024, show_default=True, metavar="N",
              help="Tokens of a forward pass.")  # fmt: skip
@click.option(
    "-o", "--out", metavar="DIR", help="Write results.json (with each row's outcome) and MT-Bench's files there."
)
@click.option("--fresh", is_flag=True, help="Evaluate finished tasks again.")
@click.option("--judge-url", metavar="URL", help="MT-Bench: an OpenAI-compatible endpoint, https://.../v1.")
@click.option("--judge-model", metavar="NAME", help="MT-Bench: the model to ask there.")
@click.option("--judge-key-env", metavar="VAR", help="MT-Bench: the environment variable that holds the key.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=1024, show_default=True, metavar="N",
              help="MT-Bench: of an answer.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to run.")
@click.option("--dtype", type=console.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="To load the weights in.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--quiet", is_flag=True, help="Nothing on stderr but an error.")
def command(model: str, tasks: str, as_json: bool, **options: Any) -> None:
    """Measure MODEL (a run directory, model, adapter, GGUF file or id) on the field's tasks."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    from owlore.evaluation.judge import judge_from
    from owlore.evaluation.tasks import find_tasks

    others = [name for name in names if name != MT_BENCH]
    if others or not names:
        if unknown := [n for n in others if n in ("mtbench", "mt-bench")]:
            raise UsageError(f"--tasks: no task {unknown[0]!r}; did you mean {MT_BENCH}?")
        find_tasks(others, options["protocol"])  # an unknown name is an error now, not after loading a large model
    judge = judge_from(options.pop("judge_url"), options.pop("judge_model"), options.pop("judge_key_env"))
    result = _measure(model, others, MT_BENCH in names, judge, options)
    click.echo(jsonlib.dumps(result) if as_json else render(result))


def _measure(model: str, names: list[str], bench: bool, judge: Any, options: dict[str, Any]) -> dict[str, Any]:
    from owlore.evaluation.mt_bench import read_bench
    from owlore.evaluation.run import evaluate, read_tasks
    from owlore.models.loading import pick_device
    from owlore.models.trained import load_trained

    keys = ("data_dir", "protocol", "limit", "shots", "shuffle")
    chosen = {key: options[key] for key in keys}
    questions = read_bench(options["data_dir"]) if bench else None
    if names:
        read_tasks(names, **chosen)  # missing or wrong data are an error now, not after loading a large model
    out = Path(options["out"]) if options["out"] else None
    device, quiet = pick_device(options["device"]), options["quiet"]
    finished = load_trained(model, device=device, dtype=options["dtype"])
    result: dict[str, Any] = {"model": model, "model_sha256": finished.sha256, "tasks": {}}
    if names:
        result |= evaluate(
            finished.model, finished.tokenizer, names, **chosen, template=options["template"],
            budget=options["budget"], identity=finished.sha256, rows=True, quiet=quiet,
            store=None if options["fresh"] else files.cache_directory("owlore") / "eval",
            notify=lambda message: console.notice(message, quiet=quiet),
        )  # fmt: skip
    if questions is not None:
        directory = out or Path("runs") / f"{Path(model).name}-eval"
        result["tasks"][MT_BENCH] = _bench(finished, questions, judge, directory, model, options)
    if out is not None:
        files.write_text(out / "results.json", jsonlib.dumps(result, allow_nan=False) + "\n")
    for measured in result["tasks"].values():
        measured.pop("rows", None)
    return result


def _bench(
    finished: Any, bench: Any, judge: Any, directory: Path, model: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Answer MT-Bench's questions, and have the answers judged if there is a judge."""
    from owlore.evaluation.mt_bench import answer_all, judge_all, scores

    quiet = options["quiet"]
    model_id = f"{Path(model).name}-{finished.sha256[:8]}"
    answers_file = directory / MT_BENCH / "model_answer" / f"{model_id}.jsonl"
    questions = bench.questions[: options["limit"]]
    with console.progress(len(questions), "answering", "question", quiet=quiet) as bar:
        answers = answer_all(
            finished.model, finished.tokenizer, questions, model_id=model_id, path=answers_file,
            max_new_tokens=options["max_new_tokens"], done=lambda: bar.update(1),
        )  # fmt: skip
    result: dict[str, Any] = {"n": len(answers), "answers": str(answers_file), "data": bench.sha256, "score": None}
    if judge is None:
        missing = "--judge-url and --judge-model (an OpenAI-compatible endpoint), --judge-key-env for its key"
        console.notice(f"mt_bench: answers are in {answers_file}; to have them judged, give {missing}", quiet=quiet)
        return result | {"missing": missing}
    file = directory / MT_BENCH / "model_judgment" / f"{judge.model.replace('/', '-')}_single.jsonl"
    with console.progress(2 * len(questions), "judging", "turn", quiet=quiet) as bar:
        judgments = judge_all(bench, questions, answers, judge, path=file, done=lambda: bar.update(1))
    return result | {"judgments": str(file), "judge": judge.model, **scores(questions, judgments)}


def render(result: dict[str, Any]) -> str:
    """The result as text: a table of the tasks, with notes on what they are comparable with."""
    lines = []
    measured = {name: one for name, one in result["tasks"].items() if name != MT_BENCH}
    if measured:
        lines.append(f"{'task':<18}{'acc':>8}{'+-':>8}{'acc_norm':>10}{'n':>8}{'shots':>7}")
    for name, one in measured.items():
        if "acc" in one:
            cells = [one["acc"], one["acc_stderr"], one.get("acc_norm")]
            shown = [("-" if c is None else f"{c:.4f}") for c in cells]
            lines.append(f"{name:<18}{shown[0]:>8}{shown[1]:>8}{shown[2]:>10}{one['n']:>8}{one['shots']:>7}")
        else:
            lines.append(
                f"{name:<18}{one['perplexity']:.3f} a token, {one['word_perplexity']:.3f} a word, "
                f"{one['bits_per_byte']:.4f} bits a byte, {one['n']} documents in windows of {one['window']}"
            )
    if measured:
        lines += ["", f"protocol {result['protocol']}" + (f", limit {result['limit']}" if result["limit"] else "")]
        lines += [f"{name}: {one['note']}" for name, one in measured.items() if "note" in one]
    if MT_BENCH in result["tasks"]:
        lines += render_bench(result["tasks"][MT_BENCH])
    return "\n".join(lines)


def render_bench(one: dict[str, Any]) -> list[str]:
    """MT-Bench's scores by turn and category, or the path of the answers if they are not judged."""
    if one["score"] is None:
        return [f"mt_bench: {one['n']} dialogues answered, not judged; {one['answers']}"]
    rows = {
        "all": one["score"],
        "first turn": one["first_turn"],
        "second turn": one["second_turn"],
        **one["categories"],
    }
    lines = [f"mt_bench, judged by {one['judge']} ({one['judged']} turns, {one['without_rating']} without a rating)"]
    return lines + [f"  {name:<14}{'-' if score is None else f'{score:.2f}':>6}" for name, score in rows.items()]

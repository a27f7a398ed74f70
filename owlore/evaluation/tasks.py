"""The tasks by name: the files with their rows, how a row is read, and the prompt.

Names and prompts are those of lm-evaluation-harness where it has the task. The rows of local files are in LLM-Adapters'
format; on the Hub they have other columns, which `hub.item` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from htsr.errors import UsageError, nearest
from owlore.evaluation import items
from owlore.evaluation.items import ANSWERS, ENDINGS, OPTIONS, SOLUTIONS, Item, Row
from owlore.evaluation.subjects import SUBJECTS

PROTOCOLS = ("likelihood", "generate")


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A task's data set on the Hugging Face Hub.

    Attributes:
        path: Id of the data set.
        name: Its configuration.
        split: The split with the questions.
        item: Converts a row to an item.
    """

    path: str
    name: str | None = None
    split: str
    item: Callable[[Row], Item]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task.

    Attributes:
        name: Name of the task.
        kind: What is measured: `choice` (likelihood of each choice's text), `partial` (likelihood of the rest of a
            sentence), `letter` (likelihood of A, B, ..), `number` (a generated number) or `text` (perplexity).
        files: Paths in --data-dir; the first that exists is read.
        parse: Converts a row of a file to an item.
        prompt: Gives the text before the answer in the likelihood protocol.
        aliases: Further names.
        shot_files: Paths of the few-shot examples in --data-dir.
        shots: Default number of few-shot examples.
        normalised: Whether `acc_norm` is reported too.
        answers: Pattern of an answer in the generate protocol; None if the task does not have that protocol.
        hub: The data set on the Hub, or None.
        description: Text before the few-shot examples.
        note: What a reader of the result has to know.
    """

    name: str
    kind: str
    files: tuple[str, ...]
    parse: Callable[[Row], Item]
    prompt: Callable[[Item], str] = lambda item: f"Question: {item.question}\nAnswer:"
    aliases: tuple[str, ...] = ()
    shot_files: tuple[str, ...] = ()
    shots: int = 0
    normalised: bool = False
    answers: str | None = None
    hub: Hub | None = None
    description: str = ""
    note: str = ""


def _below(folder: str, *names: str) -> tuple[str, ...]:
    """Paths of a file: in the directories of the published data, or directly in --data-dir."""
    return tuple(parent + name for name in names for parent in (f"{folder}/test/", "test/", ""))


def _hub_arc(row: Row) -> Item:
    return ANSWERS.item(row["question"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


def _hub_obqa(row: Row) -> Item:
    gold = row["choices"]["label"].index(row["answerKey"].strip())
    return ANSWERS.item(row["question_stem"], row["choices"]["text"], gold)


def _hub_piqa(row: Row) -> Item:
    return SOLUTIONS.item(row["goal"], (row["sol1"], row["sol2"]), int(row["label"]))


def _hub_siqa(row: Row) -> Item:
    choices = (row["answerA"], row["answerB"], row["answerC"])
    return ANSWERS.item(f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)


def _hub_hellaswag(row: Row) -> Item:
    from lm_eval.tasks.hellaswag.utils import preprocess

    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [preprocess(ending) for ending in row["endings"]]
    return ENDINGS.item(preprocess(f"{row['activity_label']}: {context}"), endings, int(row["label"]))


def _hub_winogrande(row: Row) -> Item:
    return OPTIONS.item(row["sentence"], (row["option1"], row["option2"]), int(row["answer"]) - 1)


def _hub_boolq(row: Row) -> Item:
    return items.boolq_item(row["question"], bool(row["label"]))


def _hub_aqua(row: Row) -> Item:
    shown = " ".join(f"({option[0]}) {option[2:].strip()}" for option in row["options"])
    return items.parse_aqua(
        {"instruction": f"{row['question']} Answer Choices: {shown}", "answer": row["correct"]}
    )  # fmt: skip


def _hub_svamp(row: Row) -> Item:
    return items.parse_number({"question": f"{row['Body']} {row['Question']}", "answer": row["Answer"]})


def _parse_mmlu(row: Row) -> Item:
    choices = tuple(str(row[f"choice{i}"]) for i in range(4)) if "choice0" in row else tuple(row["choices"])
    gold = int(row["answer"])
    return Item(question=str(row["question"]).strip(), choices=choices, gold=gold, answer="ABCD"[gold])


def _mmlu_prompt(item: Item) -> str:
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", item.choices, strict=True))
    return f"{item.question}{listed}\nAnswer:"


def _parse_text(row: Row) -> Item:
    return Item(question=str(row["page"]))


def _mmlu(subject: str) -> Task:
    topic = subject.replace("_", " ")
    return Task(
        name=f"mmlu_{subject}",
        kind="letter",
        files=(f"mmlu/test/{subject}_test.csv", f"test/{subject}_test.csv", f"{subject}_test.csv"),
        shot_files=(f"mmlu/dev/{subject}_dev.csv", f"dev/{subject}_dev.csv", f"{subject}_dev.csv"),
        shots=5,
        parse=_parse_mmlu,
        prompt=_mmlu_prompt,
        hub=Hub(path="cais/mmlu", name=subject, split="test", item=_parse_mmlu),
        description=f"The following are multiple choice questions (with answers) about {topic}.\n\n",
    )


_ANSWER, _NUMBER = "answer1|answer2|answer3|answer4|answer5", r"-?\d+\.?\d*"

_LISTED = (
    Task(
        name="boolq_nopassage", aliases=("boolq",), kind="choice", files=_below("commonsense", "boolq.json"),
        shot_files=("commonsense/train/boolq.json", "train/boolq.json"), parse=items.parse_boolq,
        prompt=lambda item: f"Question: {item.question}?\nAnswer:", answers="true|false",
        hub=Hub(path="aps/super_glue", name="boolq", split="validation", item=_hub_boolq),
        note="the passage is not shown: not comparable with published BoolQ",
    ),
    Task(
        name="piqa", kind="choice", files=_below("commonsense", "piqa.json"),
        shot_files=("commonsense/train/piqa.json", "train/piqa.json"), parse=SOLUTIONS.parse, normalised=True,
        answers="solution1|solution2", hub=Hub(path="baber/piqa", split="validation", item=_hub_piqa),
    ),
    Task(
        name="social_iqa", aliases=("siqa", "social_i_qa"), kind="choice",
        files=_below("commonsense", "social_i_qa.json", "social_iqa.json", "siqa.json"),
        shot_files=("commonsense/train/social_i_qa.json", "train/social_i_qa.json"), parse=ANSWERS.parse,
        prompt=lambda item: f"Q: {item.question}\nA:", normalised=True, answers=_ANSWER,
        hub=Hub(path="lighteval/siqa", split="validation", item=_hub_siqa),
    ),
    Task(
        name="hellaswag", kind="choice", files=_below("commonsense", "hellaswag.json"),
        shot_files=("commonsense/train/hellaswag.json", "train/hellaswag.json"), parse=ENDINGS.parse,
        prompt=lambda item: item.question, normalised=True, answers="ending1|ending2|ending3|ending4",
        hub=Hub(path="Rowan/hellaswag", split="validation", item=_hub_hellaswag),
        note="the rows keep the data set's lower case where the harness begins the second sentence with a capital",
    ),
    Task(
        name="winogrande", kind="partial", files=_below("commonsense", "winogrande.json"),
        shot_files=("commonsense/train/winogrande.json", "train/winogrande.json"), parse=OPTIONS.parse,
        answers="option1|option2",
        hub=Hub(path="allenai/winogrande", name="winogrande_xl", split="validation", item=_hub_winogrande),
    ),
    Task(
        name="arc_easy", aliases=("arc_e", "arc-easy", "arc-e"), kind="choice",
        files=_below("commonsense", "ARC-Easy.json", "arc_easy.json"),
        shot_files=("commonsense/train/ARC-Easy.json", "train/ARC-Easy.json"), parse=ANSWERS.parse, normalised=True,
        answers=_ANSWER, hub=Hub(path="allenai/ai2_arc", name="ARC-Easy", split="test", item=_hub_arc),
    ),
    Task(
        name="arc_challenge", aliases=("arc_c", "arc-challenge", "arc-c"), kind="choice",
        files=_below("commonsense", "ARC-Challenge.json", "arc_challenge.json"),
        shot_files=("commonsense/train/ARC-Challenge.json", "train/ARC-Challenge.json"), parse=ANSWERS.parse,
        normalised=True, answers=_ANSWER,
        hub=Hub(path="allenai/ai2_arc", name="ARC-Challenge", split="test", item=_hub_arc),
    ),
    Task(
        name="openbookqa", aliases=("obqa",), kind="choice", files=_below("commonsense", "openbookqa.json"),
        shot_files=("commonsense/train/openbookqa.json", "train/openbookqa.json"), parse=ANSWERS.parse,
        prompt=lambda item: item.question, normalised=True, answers=_ANSWER,
        hub=Hub(path="allenai/openbookqa", name="main", split="test", item=_hub_obqa),
        note="the prompt is the question alone, as in the harness",
    ),
    Task(
        name="gsm8k", kind="number",
        files=("arithmetic/gsm8k/test.jsonl", "gsm8k/test.jsonl", *_below("arithmetic", "gsm8k.json")),
        shot_files=("arithmetic/gsm8k/train.jsonl", "gsm8k/train.jsonl"), shots=5, parse=items.parse_number,
        answers=_NUMBER, hub=Hub(path="openai/gsm8k", name="main", split="test", item=items.parse_number),
    ),
    Task(
        name="svamp", kind="number", files=_below("arithmetic", "SVAMP.json", "svamp.json"), answers=_NUMBER,
        shot_files=("arithmetic/train/SVAMP.json", "train/SVAMP.json"), parse=items.parse_number,
        hub=Hub(path="ChilleD/SVAMP", split="test", item=_hub_svamp),
    ),
    Task(
        name="mawps", kind="number", files=_below("arithmetic", "mawps.json"), parse=items.parse_number,
        shot_files=("arithmetic/train/mawps.json", "train/mawps.json"), answers=_NUMBER,
    ),
    Task(
        name="aqua", aliases=("aqua_rat",), kind="choice", files=_below("arithmetic", "AQuA.json", "aqua.json"),
        shot_files=("arithmetic/train/AQuA.json", "train/AQuA.json"), parse=items.parse_aqua, normalised=True,
        answers="A|B|C|D|E", hub=Hub(path="deepmind/aqua_rat", name="raw", split="test", item=_hub_aqua),
    ),
    Task(
        name="perplexity", aliases=("wikitext", "ppl"), kind="text",
        files=("text/wikitext-2/test.txt", "wikitext-2/test.txt", "test.txt"), parse=_parse_text,
        hub=Hub(path="EleutherAI/wikitext_document_level", name="wikitext-2-raw-v1", split="test", item=_parse_text),
        note="comparable within one tokenizer only; a file with <unk> in it is not the raw text of the harness",
    ),
    *(_mmlu(subject) for subject in SUBJECTS),
)  # fmt: skip

TASKS = {task.name: task for task in _LISTED}
GROUPS = {
    "mmlu": tuple(f"mmlu_{subject}" for subject in SUBJECTS),
    "commonsense": (
        "boolq_nopassage", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    ),
}  # fmt: skip
SPREAD = ("commonsense",)  # groups that are reported task by task; the others are averaged to one result
_NAMES = {alias: task.name for task in _LISTED for alias in (task.name, *task.aliases)}


def find_tasks(names: Sequence[str], protocol: str = "likelihood") -> dict[str, tuple[Task, ...]]:
    """The tasks of these names.

    Args:
        names: Names of tasks or groups.
        protocol: "likelihood" or "generate".

    Returns:
        For each name, in this order, the task or the tasks of the group; a group in `SPREAD` is one entry per task.

    Raises:
        UsageError: A name is unknown (the message has the nearest known one), or a task does not have the protocol.
    """
    if not names:
        raise UsageError(f"--tasks: got none, expected some of {', '.join((*GROUPS, *TASKS)[:16])}")
    found: dict[str, tuple[Task, ...]] = {}
    for name in names:
        if name in SPREAD:
            found |= {member: (TASKS[member],) for member in GROUPS[name]}
        elif name in GROUPS:
            found[name] = tuple(TASKS[member] for member in GROUPS[name])
        elif name in _NAMES:
            found[name] = (TASKS[_NAMES[name]],)
        else:
            raise UsageError(f"--tasks: no task {name!r}{nearest(name, (*GROUPS, *_NAMES))}")
    for name, tasks in found.items():
        if protocol == "generate" and tasks[0].answers is None:
            raise UsageError(f"--protocol generate has no prompt for {name}: use likelihood, or leave it out")
    return found

"""Writes `owlore/assets/demo-data.jsonl`: short questions on one sentence, in alpaca form.

    python make_demo_data.py owlore/assets/demo-data.jsonl

A model of a million parameters that has read one book cannot answer questions; it can learn within a hundred steps
what a question looks like and where in the sentence its answer stands. Every row asks that: the sentence imitates the
King James text, its names, places, numbers and things are drawn afresh, and the answer is a short sentence that takes
them up. All of these are words that the demo tokenizer writes in one or two pieces: longer ones are learnt too slowly
for a demo. No (instruction, input) pair occurs twice, so rows held out have fillers in combinations never trained on.
A function of SEED alone: standard library, no data file, no network.
"""

# ruff: noqa: SIM905 (a long word list reads better as one string)

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

SEED = 0
ROWS_PER_TASK = 80

NAMES = (
    "Abel Ahab Amos Asa Asher Cain Dan David Eber Eli Gad Ham Hur Ira Israel Jacob Jehu Job Judah Judas "
    "Kish Levi Lot Moses Ner Paul Saul Seth Shem"
).split()
PLACES = "Ai Dan Edom Egypt Gath Israel Jerusalem Judah Rome Zion".split()
NUMBERS = "two three four five six seven eight nine ten twenty thirty forty".split()
THINGS = "bread wine oil water corn salt meat fish gold brass stone sheep swords rings fire dust sand".split()
SPEECHES = (
    "Arise, and go.|Fear not.|Come in peace.|Hearken unto me.|Give me bread.|Tell me thy name.|Behold, I am here.|"
    "Go not up.|I will not hide it.|Bring me water.|Stand still.|Why weepest thou?|Whence comest thou?|"
    "Peace be unto thee.|Let us go.|I have sinned.|The men are dead.|Turn again.|Blow the trumpet.|Gird up thy loins."
).split("|")
Row = dict[str, str]


def row(instruction: str, sentence: str, answer: str) -> Row:
    return {"instruction": instruction, "input": sentence, "output": answer}


def father(r: Random) -> Row:
    a, b = r.sample(NAMES, 2)
    return row(f"Who is the father of {b}?", f"And {a} begat {b}.", f"The father of {b} is {a}.")


def son(r: Random) -> Row:
    a, b = r.sample(NAMES, 2)
    return row(f"Who is the son of {a}?", f"And {a} begat {b}.", f"The son of {a} is {b}.")


def reign(r: Random) -> Row:
    name, place, number = r.choice(NAMES), r.choice(PLACES), r.choice(NUMBERS)
    question, answer = r.choice(
        [
            ("Who was the king?", f"The king was {name}."),
            ("Where did he reign?", f"He reigned in {place}."),
            ("How long did he reign?", f"He reigned {number} years."),
        ]
    )
    return row(question, f"And {name} reigned in {place} {number} years.", answer)


def gift(r: Random) -> Row:
    giver, taker = r.sample(NAMES, 2)
    first, second = r.sample(THINGS, 2)
    question, answer = r.choice(
        [
            ("What was given?", f"He gave {first} and {second}."),
            ("Who gave it?", f"It was given by {giver}."),
            ("Who received it?", f"It was given unto {taker}."),
        ]
    )
    return row(question, f"And {giver} gave unto {taker} {first} and {second}.", answer)


def speech(r: Random) -> Row:
    speaker, hearer = r.sample(NAMES, 2)
    words = r.choice(SPEECHES)
    question, answer = r.choice(
        [
            ("Who spake?", f"It was {speaker}."),
            ("Unto whom did he speak?", f"He spake unto {hearer}."),
            ("What did he say?", f"He said, {words}"),
        ]
    )
    return row(question, f"And {speaker} said unto {hearer}, {words}", answer)


def order(r: Random) -> Row:
    parent, *sons = r.sample(NAMES, 4)
    place = r.choice([("first", 0), ("second", 1), ("last", 2)])
    sentence = f"The sons of {parent}: {sons[0]}, and {sons[1]}, and {sons[2]}."
    return row(f"Name the {place[0]} son.", sentence, f"The {place[0]} son is {sons[place[1]]}.")


def repeat(r: Random) -> Row:
    things = r.sample(THINGS, r.choice([2, 3, 4]))
    listed = ", and ".join(things)
    return row("Repeat the words.", f"The words: {listed}.", f"The words: {listed}.")


TASKS: tuple[Callable[[Random], Row], ...] = (father, son, reign, gift, speech, order, repeat)


def rows(seed: int = SEED, per_task: int = ROWS_PER_TASK) -> list[Row]:
    """per_task distinct rows of every task, shuffled together."""
    r = Random(seed)
    made: dict[tuple[str, str], Row] = {}
    for task in TASKS:
        goal = len(made) + per_task
        while len(made) < goal:
            new = task(r)
            made.setdefault((new["instruction"], new["input"]), new)
    result = list(made.values())
    r.shuffle(result)
    return result


def as_jsonl(items: list[Row]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(as_jsonl(rows()), encoding="utf-8")

"""The King James text of Debian's `bible-kjv` packages as plain chapters, with whole books held out.

    apt-get install bible-kjv          # brings bible-kjv-text
    python corpus.py build/demo-model

`bible-kjv-text` keeps the text compressed; only the program of `bible-kjv` reads it. It prints one verse per line
(`Ge1:1 In the beginning ...`); the line becomes `In the beginning ...` below the heading `Genesis 1`, without its
number. Every chapter is one document; documents are separated by an empty line.

Writes `train.txt`, `heldout.txt` (the books of HELD_OUT) and `calibration-books.txt` (the books of CALIBRATION_ONLY,
which are not trained on either).
"""

# ruff: noqa: SIM905 (a long word list reads better as one string)

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

NUM_VERSES = 31_102
BOOKS = (
    "Genesis|Exodus|Leviticus|Numbers|Deuteronomy|Joshua|Judges|Ruth|1 Samuel|2 Samuel|1 Kings|2 Kings|1 Chronicles|"
    "2 Chronicles|Ezra|Nehemiah|Esther|Job|Psalm|Proverbs|Ecclesiastes|Song of Solomon|Isaiah|Jeremiah|Lamentations|"
    "Ezekiel|Daniel|Hosea|Joel|Amos|Obadiah|Jonah|Micah|Nahum|Habakkuk|Zephaniah|Haggai|Zechariah|Malachi|Matthew|Mark|"
    "Luke|John|Acts|Romans|1 Corinthians|2 Corinthians|Galatians|Ephesians|Philippians|Colossians|1 Thessalonians|"
    "2 Thessalonians|1 Timothy|2 Timothy|Titus|Philemon|Hebrews|James|1 Peter|2 Peter|1 John|2 John|3 John|Jude|"
    "Revelation"
).split("|")
HELD_OUT = ("Ruth", "Jonah", "James")  # not retold elsewhere: a held-out gospel would have its twins in training
CALIBRATION_ONLY = ("Ecclesiastes",)

VERSE = re.compile(r"([1-3]?[A-Za-z]+)(\d+):(\d+) (.+)")


def read_verses(command: str = "bible") -> str:
    """The whole text, one verse per line; `-f` switches the pretty printer off."""
    done = subprocess.run(
        [command, "-f", "gen1:1-rev22:21"], stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True
    )
    return done.stdout


def chapters(verses: str) -> dict[str, list[str]]:
    """Documents by book: `Genesis 1`, a line break and the verses of the chapter, one per line.

    Books are told by the order in which their abbreviations appear, since the program abbreviates freely.
    """
    parsed = [VERSE.fullmatch(line) for line in verses.splitlines()]
    if len(parsed) != NUM_VERSES or None in parsed:
        raise SystemExit(f"got {len(parsed)} lines, expected {NUM_VERSES} verses: is this the bible-kjv program?")
    names = dict(zip(dict.fromkeys(m[1] for m in parsed if m), BOOKS, strict=True))
    found: dict[str, dict[str, list[str]]] = {book: {} for book in BOOKS}
    for match in parsed:
        assert match is not None
        found[names[match[1]]].setdefault(match[2], []).append(match[4].strip())
    return {book: [f"{book} {n}\n" + "\n".join(text) for n, text in by.items()] for book, by in found.items()}


def main(out: Path) -> None:
    by_book = chapters(read_verses())
    out.mkdir(parents=True, exist_ok=True)
    parts = {
        "heldout.txt": HELD_OUT,
        "calibration-books.txt": CALIBRATION_ONLY,
        "train.txt": tuple(b for b in BOOKS if b not in HELD_OUT + CALIBRATION_ONLY),
    }
    for name, books in parts.items():
        documents = [chapter for book in books for chapter in by_book[book]]
        text = "\n\n".join(documents) + "\n"
        (out / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(books)} books, {len(documents)} chapters, {len(text):,} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo-model"))

"""Builds `htsr/assets/calibration.txt`, the text behind `--calibration builtin`.

    apt-get install dict-jargon        # the Jargon File 4.4.7, public domain
    python make_calibration.py build/demo-model htsr/assets/calibration.txt

Ordinary English prose in plain paragraphs: the longer paragraphs of the Jargon File, evenly spread over its alphabet,
with a chapter of Ecclesiastes (a King James book the demo model was not trained on) after every so many of them, so
that any part of the text holds both styles. Left out are headings, etymological tags, tables, verse and code, and
paragraphs with a word of CRUDE in them.
"""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path

JARGON = Path("/usr/share/dictd/jargon.dict.dz")  # dictzip is gzip with an index
TARGET = 165_000  # characters, both sources together
SHORTEST = 240
CRUDE = re.compile(r"(?i)\b\w*(fuck|shit|sex|porn|damn|bitch|bastard|penis|drug|nazi|gay|rape|crap|piss|whore)\w*\b")
FOLD = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\xa0": " "})


def paragraphs(dictionary: str) -> list[str]:
    """The prose paragraphs of the Jargon File, each as one line of plain ASCII."""
    found = []
    for block in re.split(r"\n\s*\n", dictionary):
        lines = block.splitlines()
        if not all(re.match(r" {4}\S", line) for line in lines):  # headings are flush left; verse and code go deeper
            continue
        text = " ".join(" ".join(lines).translate(FOLD).split())
        text = re.sub(r"^\d+[a-z]?\. ", "", text)  # the number of a sense
        text = re.sub(r"^(\[[^\]]*\] ?)+", "", text)  # [from Usenet; common]
        text = re.sub(r"\{ ?([^{}]*?) ?\}", r"\1", text)  # a cross-reference
        ends = text[-1:] in '.?!"' and text[:1].isupper()
        letters = sum(c.isalpha() or c in " ,.'" for c in text)
        if len(text) >= SHORTEST and ends and letters >= 0.94 * len(text) and text.isascii() and not CRUDE.search(text):
            found.append(text)
    return found


def spread(items: list[str], budget: int) -> list[str]:
    """A subset of about `budget` characters, evenly spaced, in order."""
    stride = max(1.0, sum(len(i) + 2 for i in items) / budget)
    return [items[int(k * stride)] for k in range(int(len(items) / stride))]


def interleave(prose: list[str], chapters: list[str]) -> list[str]:
    """The chapters at even distances between the paragraphs."""
    gap = len(prose) / len(chapters)
    joined: list[str] = []
    for k, chapter in enumerate(chapters):
        joined += [*prose[int(k * gap) : int((k + 1) * gap)], chapter.replace("\n", " ")]
    return joined


def main(work: Path, target: Path, jargon: Path = JARGON) -> None:
    chapters = (work / "calibration-books.txt").read_text(encoding="utf-8").strip().split("\n\n")
    chapters = [c.split("\n", 1)[1] for c in chapters]  # without `Ecclesiastes 1`
    entries = gzip.decompress(jargon.read_bytes()).decode("utf-8")
    prose = spread(paragraphs(entries), TARGET - sum(map(len, chapters)))
    text = "\n\n".join(interleave(prose, chapters)) + "\n"
    target.write_text(text, encoding="utf-8")
    print(f"{target}: {len(prose)} paragraphs and {len(chapters)} chapters, {len(text):,} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(Path, sys.argv[3:]))

"""The walk-throughs of CONTRIBUTING.md, applied to a copy of the tree: each passes the tests that it names.

A `python` block with a path as its first line is a new file. A `diff` block edits files: after `--- path` come pieces,
separated by `---`, whose old lines stand exactly once in the file. A `bash` block is the command that has to pass.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (A new .+)\n((?:(?!^## ).*\n)+)", TEXT, re.MULTILINE))


def blocks(section, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)


@pytest.fixture
def tree(tmp_path):
    """A copy of what git would track of the packages and the tests."""
    for name in ("htsr", "owlore", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def edit(tree, diff):
    for path, body in re.findall(r"^--- (\S+)\n((?:(?!^--- \S).*\n)+)", diff, re.MULTILINE):
        text = (tree / path).read_text()
        for piece in body.split("---\n"):
            lines = piece.splitlines()
            old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
            new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
            assert text.count(old) == 1, f"{path}: not there exactly once:\n{old}"
            text = text.replace(old, new)
        (tree / path).write_text(text)


def test_there_are_three():
    assert [re.search(r"\d+", title)[0] for title in SECTIONS] == ["60", "20", "60"]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_walk_through_is_short_and_passes_what_it_names(tree, section):
    added = 0
    for source in blocks(section, "python"):
        path = re.match(r"# (\S+\.py)\n", source)[1]
        (tree / path).write_text(source.split("\n", 1)[1])
        added += sum(bool(line.strip()) for line in source.splitlines()[1:])
    for diff in blocks(section, "diff"):
        edit(tree, diff)
        added += len(re.findall(r"^\+", diff, re.MULTILINE))
    assert added <= int(re.search(r"\d+", section)[0])
    (command,) = blocks(section, "bash")
    program, *arguments = shlex.split(command)
    assert program == "python"
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}"}
    done = subprocess.run(
        [sys.executable, *arguments, "-n", "0", "-q", "-p", "no:cacheprovider"],
        cwd=tree, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]

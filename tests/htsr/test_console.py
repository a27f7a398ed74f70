"""The plumbing of both command lines, run as a user runs it: a process, its exit code, its stderr."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from htsr import console

PROGRAM = """
import sys, warnings, logging, os
import click
from htsr.console import Choice, LazyGroup, notice, progress, run
from htsr.errors import BadInput, NotFound, UsageError, OutOfMemory, NotFinite

cli = LazyGroup("tool")

@cli.command()
@click.argument("kind")
@click.option("--rule", type=Choice(["uniform", "lod"]), default="lod")
@click.option("--quiet", is_flag=True)
def work(kind, rule, quiet):
    notice("a notice", quiet=quiet)
    if kind == "noise":
        warnings.warn("library warning"); logging.warning("library log"); os.write(2, b"C noise\\n"); print("result")
        if rule == "lod":
            raise BadInput("the\\nerror\\x1b[31m line")
    with progress(10, "bar", quiet=quiet) as bar:
        bar.update(3)
    errors = {"bad": BadInput("x"), "lost": NotFound("x"), "usage": UsageError("x"), "memory": OutOfMemory("x"),
              "nan": NotFinite("x"), "stop": KeyboardInterrupt(), "bug": KeyError("k"), "oom": MemoryError(),
              "file": FileNotFoundError(2, "No", "some/path")}
    if kind == "pipe":
        for _ in range(100000):
            click.echo("line")
    elif kind in errors:
        raise errors[kind]
    click.echo(f"done {rule}")

run(cli)
"""


def tool(*arguments: str, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("fine", 0),
        ("bad", 4),
        ("lost", 5),
        ("usage", 2),
        ("memory", 3),
        ("oom", 3),
        ("nan", 6),
        ("stop", 130),
        ("bug", 1),
        ("file", 5),
    ],
)
def test_each_failure_has_its_exit_code_and_one_line(kind: str, code: int) -> None:
    done = tool("work", kind, "--quiet")
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == (1 if code else 0)
    assert ("tool: error: " in done.stderr) == bool(code)
    assert done.stdout == ("" if code else "done lod\n")


def test_a_traceback_is_shown_only_with_v() -> None:
    assert "Traceback" not in tool("work", "bug").stderr
    loud = tool("work", "bug", "-v").stderr
    assert "Traceback" in loud
    assert loud.splitlines()[-1].startswith("tool: error: KeyError")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("work", "fine", "--quite"), "--quiet"),
        (("work", "fine", "--rule", "unifrom"), "did you mean uniform?"),
        (("worl", "fine"), "did you mean work?"),
        (("work",), "KIND"),
        (("work", "fine", "--rule"), "--rule"),
    ],
)
def test_wrong_usage_exits_2_and_names_the_nearest(arguments: tuple[str, ...], names: str) -> None:
    done = tool(*arguments)
    assert done.returncode == 2
    assert names in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_quiet_leaves_only_the_error_line_whatever_libraries_say() -> None:
    done = tool("work", "noise", "--quiet")
    assert done.returncode == 4
    assert done.stderr == "tool: error: the error[31m line\n"  # one line, and no escape that a terminal would obey
    assert done.stdout == "result\n"


def test_without_quiet_notices_are_said_and_library_warnings_are_not() -> None:
    done = tool("work", "noise", "--rule", "uniform")
    assert done.stderr.splitlines() == ["a notice", "C noise"]


def test_a_reader_that_leaves_early_is_no_failure() -> None:
    command = f"{sys.executable} -c '{PROGRAM.replace(chr(39), chr(34))}' work pipe | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "line\n", "a notice\n")


def test_no_arguments_show_the_help() -> None:
    done = tool()
    assert done.returncode == 0
    assert "work" in done.stdout
    assert done.stderr == ""


def test_a_lazy_command_is_imported_only_when_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text("import click\nprint('imported')\ncommand = click.command()(lambda: None)\n")
    program = textwrap.dedent(
        """
        import click
        from htsr.console import LazyGroup, run
        cli = LazyGroup("tool", lazy={"heavy": "heavy:command"})
        cli.command("light")(lambda: print("light"))
        run(cli)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    out = {
        name: subprocess.run(
            [sys.executable, "-c", program, name], capture_output=True, text=True, env=environment, timeout=60
        ).stdout
        for name in ("light", "heavy")
    }
    assert out == {"light": "light\n", "heavy": "imported\n"}


def test_what_the_system_refuses_is_said_with_the_files_name_and_without_a_traceback() -> None:
    error = PermissionError(13, "Permission denied", "models/a.safetensors")
    assert console.describe(error) == (1, "models/a.safetensors: Permission denied")

"""What both command lines share: one error line and an exit code, progress bars on terminals only, and --quiet."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import select
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from htsr.errors import HtsrError, nearest

if TYPE_CHECKING:
    from tqdm import tqdm

EXIT_FAILURE, EXIT_USAGE, EXIT_MEMORY, EXIT_NOT_FOUND, EXIT_INTERRUPTED = 1, 2, 3, 5, 130
LIBRARY_ENVIRONMENT = {  # read when a library is first imported
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def run(cli: click.Command, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line as a program: results go to stdout, a failure is one line on stderr, then the process exits.

    The exit code is the error's own (`htsr.errors`); 2 for wrong usage, 3 out of memory, 130 when interrupted, 1 for
    anything else. A traceback is printed only with -v. A reader that closes the pipe early is no failure.

    Args:
        cli: the command or group.
        arguments: the command line without the program's name; None is that of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = cli.name or "htsr"
    context: click.Context | None = None
    try:
        with cli.make_context(name, list(arguments or ["--help"])) as context:
            cli.invoke(context)
            sys.stdout.flush()
        code = 0
    except click.exceptions.Exit as signal:
        code = signal.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = EXIT_INTERRUPTED
        fail(name, "interrupted")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_gone():
            sys.exit(0)
        code, message = describe(error)
        if context is not None and context.meta.get("verbose"):
            traceback.print_exc()
        fail(name, message)
    sys.exit(code)


def describe(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and its message in one line."""
    if isinstance(error, HtsrError):
        return error.exit_code, str(error)
    if isinstance(error, click.ClickException):
        return (EXIT_USAGE if isinstance(error, click.UsageError) else error.exit_code), usage_message(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return EXIT_MEMORY, f"out of memory: {error or 'the host had no more'}"
    if isinstance(error, FileNotFoundError):
        return EXIT_NOT_FOUND, f"{error.filename or error}: not found"
    if isinstance(error, OSError) and error.filename:
        return EXIT_FAILURE, f"{error.filename}: {error.strerror}"
    detail = str(error) or "no message"
    return EXIT_FAILURE, f"{type(error).__name__}: {detail} (the traceback is shown with -v)"


def usage_message(error: click.ClickException) -> str:
    """click's message with the nearest known option named, and where the help is."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if isinstance(error, click.NoSuchOption):
        known = [] if context is None else [o for p in context.command.get_params(context) for o in p.opts]
        message = f"no such option {error.option_name}{nearest(error.option_name, known)}"
    where = f" (see `{context.command_path} --help`)" if context is not None else ""
    return message.rstrip(".") + where


def one_line(text: str) -> str:
    """`text` without line breaks and without control characters that a terminal would obey."""
    joined = " ".join(text.split())
    return "".join(c for c in joined if c.isprintable())


def fail(name: str, message: str) -> None:
    """Print the one error line."""
    click.echo(f"{name}: error: {one_line(message)}", err=True)


def notice(message: str, *, quiet: bool = False) -> None:
    """Print one line on stderr, unless quiet."""
    if not quiet:
        click.echo(one_line(message), err=True)


def progress(total: float, description: str, unit: str = "it", *, quiet: bool = False, **settings: Any) -> tqdm:
    """A tqdm bar on stderr when that is a terminal, else one that shows nothing; use as a context manager."""
    from tqdm import tqdm

    shown = sys.stderr.isatty() and not quiet
    return tqdm(total=total, desc=description, unit=unit, disable=not shown, file=sys.stderr, leave=False, **settings)


@contextlib.contextmanager
def quiet_libraries(*, prints: bool = False) -> Iterator[None]:
    """Silence the warnings, log lines and progress bars of libraries while the context is open.

    Warning filters, log levels and bars are as before afterwards. Bars are those of a transformers that is imported
    already. (A program sets LIBRARY_ENVIRONMENT instead.)

    Args:
        prints: discards everything that is written to stdout and stderr too.
    """
    import logging

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), _without_transformers_bars(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        if prints:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def silence_stderr() -> Iterator[None]:
    """Discard everything written to stderr while the context is open, by C libraries and child processes too."""
    sys.stderr.flush()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        saved = _dup_stderr()
        try:
            if saved is not None:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            if saved is not None:
                os.dup2(saved, 2)
                os.close(saved)


class Command(click.Command):
    """A command with `-v/--verbose`; without it libraries are silent, and with `--quiet` nothing reaches stderr."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params.append(_verbose_option())

    def invoke(self, context: click.Context) -> Any:
        """Run the command with the noise of libraries off; with `--quiet` nothing at all reaches stderr."""
        if context.meta.get("verbose"):
            return super().invoke(context)
        for key, value in LIBRARY_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        with quiet_libraries(), silence_stderr() if context.params.get("quiet") else contextlib.nullcontext():
            return super().invoke(context)


class LazyGroup(click.Group):
    """A group that names the nearest command for an unknown one and can import a command when it is used."""

    command_class = Command

    def __init__(self, *args: Any, lazy: Mapping[str, str] | None = None, **settings: Any) -> None:
        """`lazy` maps a command's name to 'module:attribute'; such modules must import nothing heavy at the top."""
        super().__init__(*args, **settings)
        self.lazy = dict(lazy or {})

    def list_commands(self, context: click.Context) -> list[str]:
        """Commands in the order they were declared, lazy ones last."""
        return [*self.commands, *self.lazy]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command, imported now if it is lazy."""
        if name in self.lazy:
            module, attribute = self.lazy[name].split(":")
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        return super().get_command(context, name)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with a usage error that names the nearest command."""
        if args and not args[0].startswith("-") and self.get_command(context, args[0]) is None:
            hint = nearest(args[0], self.list_commands(context))
            raise click.UsageError(f"no such command {args[0]!r}{hint}", context)
        return super().resolve_command(context, args)


class Choice(click.Choice):
    """A choice whose error names the nearest known value."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """The value itself when it is known."""
        if value not in self.choices:
            self.fail(f"got {value!r}{nearest(str(value), [str(c) for c in self.choices])}", parameter, context)
        return value


class Numbers(click.ParamType):
    """A number, or several with commas between them: a float, or a tuple of floats."""

    name = "number[,number...]"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """The float or floats of the text."""
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"got {value!r}, expected a number or several with commas between them", parameter, context)
        return numbers if len(numbers) > 1 else numbers[0]


def _verbose_option() -> click.Option:
    def remember(context: click.Context, _: click.Parameter, value: bool) -> None:
        context.find_root().meta["verbose"] = value

    return click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=remember,
        help="Show the traceback of a failure and what the libraries say.",
    )


@contextlib.contextmanager
def _without_transformers_bars() -> Iterator[None]:
    """transformers draws bars while it loads weights; only those of an already imported one need switching off."""
    library = sys.modules.get("transformers")
    control = getattr(getattr(library, "utils", None), "logging", None)
    if control is None or not control.is_progress_bar_enabled():
        yield
        return
    control.disable_progress_bar()
    try:
        yield
    finally:
        control.enable_progress_bar()


def _dup_stderr() -> int | None:
    """A duplicate of file descriptor 2, or None where the process has none."""
    try:
        return os.dup(2)
    except OSError:
        return None


def _reader_gone() -> bool:
    """Whether stdout is the broken pipe; then it is replaced, since the interpreter flushes it again at exit."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True

"""Errors that a user can act on. Each class carries the exit code of the command line's contract.

A message says what was got, what was expected and what to do about it, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HtsrError(Exception):
    """A failure while running; the base class of all errors that this program raises itself."""

    exit_code = 1


class UsageError(HtsrError, ValueError):
    """Wrong usage, configuration or unknown key."""

    exit_code = 2


class OutOfMemory(HtsrError, MemoryError):
    """The device's or the host's memory did not suffice; the message holds the breakdown."""

    exit_code = 3


class BadInput(HtsrError, ValueError):
    """A model, data set or table that exists and cannot be used."""

    exit_code = 4


class NotFound(HtsrError, FileNotFoundError):
    """A path or id that cannot be found, or that would need the network while offline."""

    exit_code = 5


class NotFinite(HtsrError, ArithmeticError):
    """The loss became NaN or infinite."""

    exit_code = 6


class Interrupted(HtsrError):
    """SIGINT or SIGTERM arrived and a clean checkpoint was written."""

    exit_code = 130


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known word closest to `word`, or nothing when none is close."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known word closest to `word`, or the list of them when none is close."""
    known = list(known)
    return did_you_mean(word, known) or (f"; known: {', '.join(known)}" if known else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class when it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

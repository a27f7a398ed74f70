"""Parsers of option values: the same for a command line's text, a YAML value and a Python argument.

A parser takes any value and returns a typed one, or raises ValueError with what it expected. It also knows how the
value is named in a help text (`metavar`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from htsr.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Parser:
    """A parser of option values; call it with a value.

    Attributes:
        metavar: how the value is named in a help text; empty for a flag without a value.
        parse: returns the typed value, or raises ValueError with what it expected.
        repeated: whether a command line may give the option several times.
    """

    metavar: str
    parse: Callable[[Any], Any]
    repeated: bool = False

    def __call__(self, value: Any) -> Any:
        return self.parse(value)


def integer(minimum: int = 0) -> Parser:
    """A whole number not below `minimum`."""
    expected = f"a whole number >= {minimum}"

    def parse(value: Any) -> int:
        number = _number(value, expected)
        if number != int(number) or number < minimum:
            raise ValueError(expected)
        return int(number)

    return Parser("N", parse)


def number(minimum: float, *, above: bool = False, below: float | None = None) -> Parser:
    """A number >= minimum (> with `above`), and < `below` where there is such a limit."""
    expected = f"a number {'>' if above else '>='} {minimum:g}" + ("" if below is None else f" and < {below:g}")

    def parse(value: Any) -> float:
        got = _number(value, expected)
        if got < minimum or (above and got == minimum) or (below is not None and got >= below):
            raise ValueError(expected)
        return got

    return Parser("X", parse)


def one_of_integers(*known: int) -> Parser:
    """One of the whole numbers `known`."""
    expected = "one of " + ", ".join(map(str, known))

    def parse(value: Any) -> int:
        number = _number(value, expected)
        if number not in known:
            raise ValueError(expected)
        return int(number)

    return Parser("|".join(map(str, known)), parse)


def choice(*known: str) -> Parser:
    """One of the words `known`. YAML reads a bare on/off as true/false: those are taken for the words."""

    def parse(value: Any) -> str:
        word = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
        if word not in known:
            raise ValueError("one of " + ", ".join(known) + did_you_mean(str(word), known))
        return str(word)

    return Parser("|".join(known), parse)


def word_or(words: tuple[str, ...], other: Parser) -> Parser:
    """One of `words`, or what `other` reads."""

    def parse(value: Any) -> Any:
        if isinstance(value, str) and value in words:
            return value
        try:
            return other(value)
        except ValueError as error:
            raise ValueError(f"{', '.join(words)} or {error}") from error

    return Parser("|".join((*words, other.metavar)), parse)


def names(*known: str) -> Parser:
    """Some of `known`, joined by commas or as a list; `none` is the empty tuple. Kept in the order of `known`."""
    expected = f"none, or a comma list of {', '.join(known)}"

    def parse(value: Any) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else list(value or ())
        chosen = {str(part).strip() for part in parts} - {"none", ""}
        unknown = sorted(chosen - set(known))
        if unknown:
            raise ValueError(expected + did_you_mean(unknown[0], known))
        return tuple(name for name in known if name in chosen)

    return Parser("none|" + ",".join(known), parse)


def text(metavar: str = "TEXT", pattern: str | None = None, expected: str = "text") -> Parser:
    """A non-empty text, all of which matches `pattern` where one is given."""

    def parse(value: Any) -> str:
        got = str(value).strip() if isinstance(value, str) or hasattr(value, "__fspath__") else ""
        if not got or (pattern is not None and not re.fullmatch(pattern, got)):
            raise ValueError(expected)
        return got

    return Parser(metavar, parse)


def targets() -> Parser:
    """Module names, joined by commas or as a list: a list of them; the word `all-linear` stays what it is."""
    expected = "all-linear, or a comma list of module names"

    def parse(value: Any) -> str | list[str]:
        parts = value.split(",") if isinstance(value, str) else list(value)
        found = [str(part).strip() for part in parts]
        if not found or not all(found):
            raise ValueError(expected)
        return "all-linear" if found == ["all-linear"] else found

    return Parser("all-linear|NAME,...", parse)


def pairs() -> Parser:
    """key=value texts, or a mapping: the mapping. The values stay as they are given; the method parses them."""
    expected = "key=value, or a mapping"

    def parse(value: Any) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return {str(key).replace("-", "_"): one for key, one in value.items()}
        found = {}
        parts = [value] if isinstance(value, str) else list(value)
        if not parts:
            raise ValueError(expected)
        for part in parts:
            key, sign, one = str(part).partition("=")
            if not sign or not key.strip():
                raise ValueError(expected)
            found[key.strip().replace("-", "_")] = one.strip()
        return found

    return Parser("KEY=VALUE", parse, repeated=True)


def share_or_path() -> Parser:
    """A share in (0, 1) as a float, or a path or name as text."""

    def parse(value: Any) -> float | str:
        try:
            share = _number(value, "")
        except ValueError:
            return text(expected="a share between 0 and 1, or a path")(value)
        if not 0.0 < share < 1.0:
            raise ValueError("a share between 0 and 1, or a path")
        return share

    return Parser("PATH|FRACTION", parse)


def off_or_number() -> Parser:
    """A number > 0, or None for 0 and `none`."""

    def parse(value: Any) -> float | None:
        if value is None or value == "none":
            return None
        return number(0.0)(value) or None

    return Parser("X", parse)


def flag() -> Parser:
    """True or false."""

    def parse(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value

    return Parser("", parse)


def true_or_path() -> Parser:
    """True (the bare flag), False, or a path."""

    def parse(value: Any) -> bool | str:
        return value if isinstance(value, bool) else text(expected="nothing, or a directory")(value)

    return Parser("[DIR]", parse)


@dataclass(frozen=True)
class MethodOption:
    """An option of one method, given as `--set key=value`.

    Attributes:
        default: the value where none is given.
        parser: checks a value and makes a typed one.
        help: text of `owlore methods NAME`.
    """

    default: Any
    parser: Parser
    help: str


def read_method_options(declared: Mapping[str, MethodOption], given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Parse a method's own options.

    Args:
        declared: the method's options by name.
        given: what the user gave, as text or as values.
        method: name of the method.

    Returns:
        Every declared option by name: what is given, parsed, else its default.

    Raises:
        UsageError: a value cannot be parsed, or a key is unknown; the message names the nearest known one.
    """
    for key in given:
        if key not in declared:
            hint = did_you_mean(key, declared) or f" (it has {', '.join(declared) or 'none'})"
            raise UsageError(
                f"--set {key}: the method {method} has no such option{hint}; see `owlore methods {method}`"
            )
    found = {}
    for key, option in declared.items():
        try:
            value = given.get(key, option.default)
            found[key] = None if value is None and option.default is None else option.parser(value)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--set {key} got {given[key]!r}, expected {error}") from error
    return found


_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2**20, "GIB": 2**30}


def bytes_of(value: str, name: str) -> int:
    """Bytes of a size such as 8GB (8e9) or 7.5GiB (7.5 * 2^30).

    Args:
        value: the text.
        name: name of the option, for the error.

    Raises:
        UsageError: the text is no size, or is less than a megabyte, as an 8 without its unit is.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", value)
    unit = None if not found else _UNITS.get(found[2].upper())
    if not found or unit is None or float(found[1]) * unit < 1e6:
        raise UsageError(f"{name} got {value!r}, expected a size such as 8GB or 7.5GiB")
    return int(float(found[1]) * unit)


def _number(value: Any, expected: str) -> float:
    """A finite number from a number or its text (YAML leaves 3e-4 a text)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(expected)
    try:
        got = float(value)
    except ValueError as error:
        raise ValueError(expected) from error
    if got != got or got in (float("inf"), float("-inf")):
        raise ValueError(expected)
    return got

"""Names that a user may choose from, without anything heavy: the command lines list them in their help."""

from __future__ import annotations

from collections.abc import Sequence

from htsr.errors import UsageError, did_you_mean

RULES = ("lod", "alpha", "uniform", "decrease", "increase", "reverse", "norm")
DIRECTIONS = ("heavy", "light")
PRECISIONS = ("auto", "fp32", "fp64")
ENGINES = ("native", "weightwatcher")
SCOPES = ("block", "matrix")


def check_choice(name: str, got: str, known: Sequence[str]) -> None:
    """Raise a UsageError that names the nearest known value, unless `got` is one of them."""
    if got not in known:
        raise UsageError(f"{name}: got {got!r}, expected one of {', '.join(known)}{did_you_mean(str(got), known)}")

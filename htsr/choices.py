"""Names that a user may choose from, without anything heavy: the command lines list them in their help."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from htsr.errors import UsageError

RULES = ("lod", "alpha", "uniform", "decrease", "increase", "reverse", "norm")
DIRECTIONS = ("heavy", "light")
PRECISIONS = ("auto", "fp32", "fp64")
ENGINES = ("native", "weightwatcher")
SCOPES = ("block", "matrix")


def check_choice(name: str, got: str, known: Sequence[str]) -> None:
    """Raise a UsageError that names the nearest known value."""
    if got in known:
        return
    near = difflib.get_close_matches(str(got), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    raise UsageError(f"{name}: got {got!r}, expected one of {', '.join(known)}; {hint}")

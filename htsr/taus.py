"""Outlier limits: one tau or several, and the names of the columns that each has."""

from __future__ import annotations

import math
from collections.abc import Sequence

from htsr.errors import UsageError

LOD_COLUMNS = ("lod", "lod_weight")


def check_taus(tau: float | Sequence[float]) -> tuple[float, ...]:
    """Check the outlier limits.

    Args:
        tau: a number or a sequence of different numbers, above 0; the first is the layer table's.

    Returns:
        All of them, as floats.

    Raises:
        UsageError: a value is no positive finite number, or occurs twice, or there is none.
    """
    given = tuple(tau) if isinstance(tau, list | tuple) else (tau,)
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UsageError(f"tau: got {value!r}, expected a positive number or several (13 in OwLore, 3 to 7 in OWL)")
    taus = tuple(float(value) for value in given)
    if not taus or len({tau_column("lod", t) for t in taus}) < len(taus):
        raise UsageError(f"tau: got {given}, expected at least one number, each once")
    return taus


def tau_column(column: str, tau: float) -> str:
    """The name of `lod` or `lod_weight` at a tau beside the first: `lod_tau5`."""
    return f"{column}_tau{tau:g}"


def further_columns(taus: Sequence[float]) -> list[str]:
    """The columns of all taus but the first, which has the plain names."""
    return [tau_column(column, tau) for tau in taus[1:] for column in LOD_COLUMNS]


def is_tau_column(name: str) -> bool:
    """Whether a column of a scan is one of `further_columns`."""
    return name.startswith(tuple(f"{column}_tau" for column in LOD_COLUMNS))

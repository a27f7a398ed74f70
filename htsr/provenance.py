"""What is recorded of how a result was made: versions, routes of the spectra, memory."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

SCHEMA = "htsr-scan/1"  # of scan.json and the files beside it
LIBRARIES = ("numpy", "scipy", "torch", "transformers", "safetensors", "pandas")


def versions(*others: str) -> dict[str, str]:
    """Versions of this package, of Python and of the libraries that numbers depend on; none is imported."""
    found = {"htsr": _version("htsr-owlore"), "python": platform.python_version()}
    return found | {name: _version(name) for name in (*LIBRARIES, *others)}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def spectra_record(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How the spectra were found: matrices by route, how many came from the cache, what was escalated at which cost."""
    found = [row for row in rows if "route" in row]
    return {
        "routes": dict(Counter(row["route"] for row in found)),
        "cached": sum(bool(row.get("cached")) for row in found),
        "gflop": sum(row["flops"] for row in found) / 1e9,
        "escalated": [
            {"tensor": row["tensor"], "why": row["why"], "seconds": row["seconds"], "gflop": row["flops"] / 1e9}
            for row in found
            if row["route"] == "escalated"
        ],
    }


def peak_bytes() -> int:
    """The largest resident set of this process so far; 0 where the system does not tell.

    Linux's own record of this program comes first: `ru_maxrss` also remembers the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

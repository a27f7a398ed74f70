"""metrics.jsonl, and the memory in use.

Each line is an object: exactly one `train` row per optimizer step, counted from 1, and `eval` rows. Every row has the
same keys; a value that was not measured is null.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from htsr import files
from htsr.provenance import peak_bytes

KEYS = (
    "step",
    "epoch",
    "split",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "tokens_per_s",
    "mem_bytes",
    "state_bytes",
    "active_blocks",
)


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, with three or more consecutive ones as a range: 0-5,8,9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [[f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run) for run in runs]
    return ",".join(part for run in parts for part in run)


class MetricsLog:
    """Appends rows to a file and keeps them in memory; a row is in the file when `write` returns.

    Args:
        path: The file.
        more: Keys of this run's rows in addition to `KEYS`.
        writes: Whether this process writes the file; otherwise it only keeps the rows.
    """

    def __init__(self, path: Path, *, more: tuple[str, ...] = (), writes: bool = True) -> None:
        self.path, self.keys, self.writes = path, KEYS + more, writes
        self.rows: list[dict[str, Any]] = []

    def open(self, *, after: int | None) -> None:
        """Start the file.

        Args:
            after: Step from which a run is resumed: the rows up to it are kept, later rows and an incomplete last line
                are dropped. None is a new run.
        """
        if after is not None and self.path.exists():
            self.rows = _rows_until(self.path, after)
        if not self.writes:
            return
        files.write_text(self.path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows))

    def write(self, **row: Any) -> dict[str, Any]:
        """Append a row; keys that are not given are null."""
        unknown = set(row) - set(self.keys)
        assert not unknown, f"not a metrics key: {unknown}"
        full = {key: row.get(key) for key in self.keys}
        self.rows.append(full)
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(full, allow_nan=False) + "\n")
        return full


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= step:
            rows.append(row)
    return rows


def memory_held(device: torch.device) -> int:
    """Bytes allocated on a CUDA device; on the CPU the resident set of this process."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_bytes()


def memory_peak(device: torch.device) -> dict[str, int]:
    """Peak of the process in bytes: allocated and reserved on a CUDA device, the resident set on the CPU."""
    if device.type == "cuda":
        return {
            "peak_bytes": int(torch.cuda.max_memory_allocated(device)),
            "peak_reserved_bytes": int(torch.cuda.max_memory_reserved(device)),
        }
    return {"peak_bytes": peak_bytes()}

"""Where a run's layer table comes from: a file, a rule, or a scan of the model at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import htsr
from htsr import LayerTable
from htsr.errors import BadInput, HtsrError, UsageError
from owlore.sampling import inclusion

DEFAULT_GAMMA = 5
Say = Callable[[str], None]


def cache_directory() -> Path:
    """Where tables of scanned models are kept: $OWLORE_CACHE, else the user's cache folder."""
    root = os.environ.get("OWLORE_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "owlore"


def find_table(wanted: str | Path | LayerTable | None, *, num_blocks: int, scan: Callable[[], LayerTable], say: Say,
               weights_sha256: str, floor: float = 0.0) -> LayerTable | None:  # fmt: skip
    """The table that `wanted` names: `auto` (scan), `uniform`, `decrease`, a file, a table, or None for none.

    Raises: BadInput for a table of another depth; NotFound for a missing file. A table made from other weights is
    used, and said aloud.
    """
    if wanted is None:
        return None
    if isinstance(wanted, LayerTable):
        table = wanted
    elif wanted == "auto":
        table = scan()
    elif wanted in ("uniform", "decrease"):
        scores = np.ones(num_blocks) if wanted == "uniform" else np.arange(num_blocks, 0, -1.0)
        table = LayerTable.build(scores, min(DEFAULT_GAMMA, num_blocks), rule=str(wanted))
    else:
        table = LayerTable.load(Path(wanted))
    if table.num_blocks != num_blocks:
        raise BadInput(
            f"the table has {table.num_blocks} blocks and the model has {num_blocks}: scan this model (--table auto)"
        )
    origin = table.model.get("weights_sha256")
    if origin and weights_sha256 and origin != weights_sha256:
        say(f"note: the table was made from other weights ({table.model.get('id')}); it is used as it is")
    if table.note:
        say(f"note: {table.note}")
    if (made_with := table.rule.get("floor")) and not floor:
        say(f"note: the table was made with floor {made_with:g} and this run has none; --floor {made_with:g} keeps it")
    return table


def scanned_table(model: Any, tokenizer: Any, *, weights_sha256: str, say: Say, quiet: bool) -> LayerTable:
    """The LOD table of a model (alpha where no calibration can run, uniform where nothing can), cached by weights."""
    cached = cache_directory() / "tables" / f"{weights_sha256[:32]}-htsr-{htsr.__version__}.json"
    if cached.is_file():
        try:
            table = LayerTable.load(cached)
            say(f"layer table of an earlier scan of these weights: rule {table.rule.get('name')} ({cached})")
            return table
        except HtsrError:
            cached.unlink()
    say("no layer table given: scanning the model first (kept for the next run on the same weights)")
    result = htsr.scan(model, tokenizer=tokenizer, quiet=quiet, plots=False)
    for rule in ("lod", "alpha"):
        try:
            table = result.table(rule=rule)
            break
        except BadInput:
            say(f"the scan gave no {rule} for every block")
    else:
        table = result.table(rule="uniform")
    cached.parent.mkdir(parents=True, exist_ok=True)
    table.save(cached)
    return table


def run_inclusion(table: LayerTable, *, active: int | None, floor: float) -> np.ndarray:
    """Inclusion probabilities for this run's gamma, from the table's probabilities.

    active: blocks a period; None is the table's own. More than there are blocks means all of them.
    """
    gamma = min(active if active is not None else table.gamma, table.num_blocks)
    if gamma < 1:
        raise UsageError(f"--active got {active}, expected at least 1 block a period")
    return inclusion(table.probability, gamma, floor)

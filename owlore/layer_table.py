"""Where a run's layer table comes from: a file, a rule, or a scan of the model at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import htsr
from htsr import LayerTable, files
from htsr.errors import BadInput, HtsrError, UsageError
from owlore.sampling import inclusion

DEFAULT_GAMMA = 5
Notify = Callable[[str], None]


def cache_directory() -> Path:
    """Where tables of scanned models are kept: $OWLORE_CACHE, else the user's cache folder."""
    return files.cache_directory("owlore")


def find_table(
    wanted: str | Path | LayerTable | None,
    *,
    num_blocks: int,
    scan: Callable[[], LayerTable],
    notify: Notify,
    weights_sha256: str,
) -> LayerTable | None:
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
        notify(f"note: the table was made from other weights ({table.model.get('id')}); it is used as it is")
    if table.note:
        notify(f"note: {table.note}")
    return table


def scanned_table(model: Any, tokenizer: Any, *, weights_sha256: str, notify: Notify, quiet: bool) -> LayerTable:
    """The LOD table of a model (alpha where no calibration can run, uniform where nothing can), cached by weights."""
    cached = cache_directory() / "tables" / f"{weights_sha256[:32]}-htsr-{htsr.__version__}.json"
    if cached.is_file():
        try:
            table = LayerTable.load(cached)
            notify(f"layer table of an earlier scan of these weights: rule {table.rule.get('name')} ({cached})")
            return table
        except HtsrError:
            cached.unlink()
    notify("no layer table given: scanning the model first (kept for the next run on the same weights)")
    result = htsr.scan(model, tokenizer=tokenizer, quiet=quiet, plots=False)
    for rule in ("lod", "alpha"):
        try:
            table = result.table(rule=rule)
            break
        except BadInput:
            notify(f"the scan gave no {rule} for every block")
    else:
        table = result.table(rule="uniform")
    cached.parent.mkdir(parents=True, exist_ok=True)
    table.save(cached)
    return table


def run_inclusion(table: LayerTable, *, active: int | None, floor: float | None) -> np.ndarray:
    """Inclusion probabilities for this run's gamma, from the table's probabilities.

    active: blocks a period; None is the table's own. More than there are blocks means all of them. floor: None is the
    floor that the table was made with.

    Raises: UsageError when a floor that is asked for, or the table's, is more than gamma / blocks.
    """
    gamma = min(active if active is not None else table.gamma, table.num_blocks)
    if gamma < 1:
        raise UsageError(f"--active got {active}, expected at least 1 block a period")
    own = floor_of(table)
    if floor is None and own > gamma / table.num_blocks * (1 + 1e-12):
        raise UsageError(
            f"the table was made with floor {own:g} and {gamma} of {table.num_blocks} blocks a period allow "
            f"{gamma / table.num_blocks:.4g}: give a --floor, or a larger --active"
        )
    return inclusion(table.probability, gamma, own if floor is None else floor)


def floor_of(table: LayerTable) -> float:
    """The lower bound on inclusions that a table's rule names, 0 without one."""
    found = table.rule.get("floor", 0.0)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < 1:
        raise BadInput(
            f"the table's rule has floor {found!r}, expected a number from 0 to 1; make it with `htsr table`"
        )
    return float(found)

"""The layer table of a run: from a file, by a rule, or from a scan of the model."""

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


def find_table(
    wanted: str | Path | LayerTable | None,
    *,
    num_blocks: int,
    scan: Callable[[], LayerTable],
    notify: Notify,
    weights_sha256: str,
) -> LayerTable | None:
    """Find the layer table of a run.

    Args:
        wanted: "auto" for a scan, "uniform", "decrease", a file, a table, or None for no table.
        num_blocks: Number of blocks of the model.
        scan: Scans the model.
        notify: Called with notes, such as one on a table that was made from other weights.
        weights_sha256: Digest of the model's weights, or an empty string.

    Raises:
        NotFound: The file does not exist.
        BadInput: The table has another number of blocks, or the file is not a table.
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
    """Scan a model for its layer table, which is cached by the digest of the weights.

    Args:
        model: What `htsr.scan` takes.
        tokenizer: The tokenizer for the calibration.
        weights_sha256: Digest of the model's weights.
        notify: Called with messages about the scan.
        quiet: Whether to show no progress bar.

    Returns:
        The table by LOD; by alpha if there is no LOD for every block, and uniform if there is no alpha either.
    """
    cached = files.cache_directory("owlore") / "tables" / f"{weights_sha256[:32]}-htsr-{htsr.__version__}.json"
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
    """Inclusion probabilities of a run from the probabilities of its table.

    Args:
        table: The layer table.
        active: Number of active blocks in a period, at most the number of blocks; None takes the table's gamma.
        floor: Lower bound of the inclusion probabilities; None takes that of the table.

    Returns:
        The inclusion probability of each block, (blocks,) fp64.

    Raises:
        UsageError: `active` is below 1, or the floor is above gamma / blocks.
    """
    gamma = min(active if active is not None else table.gamma, table.num_blocks)
    if gamma < 1:
        raise UsageError(f"--active got {active}, expected at least 1 block a period")
    table_floor = floor_of(table)
    if floor is None and table_floor > gamma / table.num_blocks * (1 + 1e-12):
        raise UsageError(
            f"the table was made with floor {table_floor:g} and {gamma} of {table.num_blocks} blocks a period allow "
            f"{gamma / table.num_blocks:.4g}: give a --floor, or a larger --active"
        )
    return inclusion(table.probability, gamma, table_floor if floor is None else floor)


def floor_of(table: LayerTable) -> float:
    """The lower bound of the inclusion probabilities in a table's rule, 0 without one.

    Raises:
        BadInput: It is not a number from 0 to 1.
    """
    found = table.rule.get("floor", 0.0)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < 1:
        raise BadInput(
            f"the table's rule has floor {found!r}, expected a number from 0 to 1; make it with `htsr table`"
        )
    return float(found)

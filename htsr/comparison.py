"""Two scans side by side, matrix by matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from htsr.errors import BadInput

if TYPE_CHECKING:
    from htsr.scan_data import ScanData

COMPARED = ("alpha", "alpha_hill", "lod", "lod_weight", "log10_norm", "stable_rank")


def compare(
    a: ScanData, b: ScanData, *, models: tuple[Any, Any] | None = None, rank: int = 10, quiet: bool = True
) -> pd.DataFrame:
    """The matrices of two scans side by side: for each number its value in a, in b, and b - a.

    Matrices meet by block and role (and by name outside the blocks); one that only one scan has keeps its row.

    Args:
        a: the scan whose numbers are subtracted.
        b: the scan that they are subtracted from.
        models: the two scanned models, as `htsr.scan` takes them; adds the overlap of the spaces of their `rank`
            leading singular vectors, see `htsr.overlap.overlaps`.
        rank: number of singular vectors that span a space, at least 1; only read with `models`.
        quiet: shows no progress bar; only read with `models`.

    Returns:
        A frame with a row a matrix: `block`, `role`, `tensor`, and for each number `_a`, `_b` and `_diff`.

    Raises:
        UsageError: a rank below 1.
        BadInput: the scans have no matrix in common, or a model is not the one that was scanned.
    """
    left, right = _keyed(a.frame), _keyed(b.frame)
    if left.index.intersection(right.index).empty:
        raise BadInput("compare: the scans have no matrix in common (block and role), expected scans of related models")
    both = left.add_suffix("_a").join(right.add_suffix("_b"), how="outer")
    columns: dict[str, Any] = {"tensor": both["tensor_a"].where(both["tensor_a"].notna(), both["tensor_b"])}
    for name in COMPARED:
        first, second = both[f"{name}_a"].astype(float), both[f"{name}_b"].astype(float)
        columns |= {f"{name}_a": first, f"{name}_b": second, f"{name}_diff": second - first}
    result = pd.DataFrame(columns, index=both.index)
    if models is not None:
        from htsr.overlap import open_scanned, overlaps

        sources = [open_scanned(scan, model) for scan, model in zip((a, b), models, strict=True)]
        result = result.join(overlaps(*sources, rank=rank, quiet=quiet))
    result = result.reset_index()
    result["block"] = result["block"].where(result["block"] >= 0).astype("Int64")
    return result.sort_values(["block", "role"], kind="stable", na_position="first", ignore_index=True)


def _keyed(frame: pd.DataFrame) -> pd.DataFrame:
    """The analysed matrices under (block, role); -1 stands for no block, which an index can hold and NA cannot."""
    matrices = frame[frame["status"] != "skipped"]
    keys = {"block": matrices["block"].fillna(-1).astype(int), "role": matrices["role"]}
    outside = matrices["block"].isna()
    keys["role"] = keys["role"].where(~outside, matrices["tensor"])
    return matrices[["tensor", *COMPARED]].set_index([pd.Index(values, name=name) for name, values in keys.items()])

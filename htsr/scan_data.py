"""The plain record of a scan: a row a matrix, a row a block, and the layer table that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from htsr.errors import BadInput
from htsr.layer_table import LayerTable
from htsr.probability import scores_by_rule
from htsr.taus import LOD_COLUMNS, is_tau_column

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_COLUMNS = (
    "block", "alpha", "alpha_hill", "lod", "lod_weight", "log10_norm", "stable_rank", "matrices", "parameters",
    "score", "probability", "inclusion",
)  # fmt: skip


BlockLod = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ScanData:
    """A scanned model: its numbers and what follows from them, without pictures and files.

    Attributes:
        frame: a row a tensor; the columns of scan.csv.
        provenance: what scan.json holds: model, settings, calibration, versions, seconds, peak_bytes.
        spectra: tensor name -> eigenvalues, ascending, where they were kept.
        block_lod: block index -> column (`lod`, `lod_weight`, those of further taus) -> percent of outliers, pooled
            over the block. A block or column that is missing gets the mean of its matrices'.
    """

    frame: pd.DataFrame
    provenance: Mapping[str, Any]
    spectra: Mapping[str, NDArray[np.float64]] | None = None
    block_lod: BlockLod = field(default_factory=dict)

    @cached_property
    def blocks(self) -> pd.DataFrame:
        """A row a block; the columns of blocks.csv, with the default table's shares when there is one."""
        return with_shares(self._measured, self.default_table)

    @cached_property
    def default_table(self) -> LayerTable | None:
        """The table of `default_rule`; None for a model without blocks."""
        return self.table() if len(self._measured) else None

    @property
    def default_rule(self) -> str:
        """lod where every block has one, else alpha, else uniform."""
        usable = [rule for rule in ("lod", "alpha") if np.isfinite(self._measured[rule]).all()]
        return usable[0] if usable else "uniform"

    def table(
        self,
        rule: str | None = None,
        gamma: int = 5,
        temperature: float = 1.0,
        floor: float = 0.0,
        direction: str = "heavy",
    ) -> LayerTable:
        """Make the layer table of this scan: how often each block is to be trained.

        Args:
            rule: how blocks are scored, see `htsr.probability.scores_by_rule`; None is `default_rule`.
            gamma: number of blocks in a draw, at least 1; it is cut to the number of blocks.
            temperature: the probabilities follow score^(1/temperature); above 0.
            floor: lower bound on every inclusion, from 0 to gamma / blocks.
            direction: `heavy` or `light`, of rule alpha.

        Returns:
            The table; its `note` says when there are fewer positive scores than gamma.

        Raises:
            UsageError: the rule or direction is unknown, or a number is out of range.
            BadInput: the rule needs numbers that this scan does not have.
        """
        rule = rule or self.default_rule
        scores = scores_by_rule(rule, self._measured, direction)
        described: dict[str, Any] = {"name": rule}
        if rule == "alpha":
            described["direction"] = direction
        if rule in ("lod", "reverse"):
            described |= {name: self.provenance.get("settings", {}).get(name) for name in ("tau", "lod_scope")}
            described["calibration"] = self.provenance.get("calibration")
        model = self.provenance.get("model", {})
        return LayerTable.build(scores, gamma, temperature, floor, rule=described, model=model)

    def __repr__(self) -> str:
        analysed, name = int((self.frame["status"] == "ok").sum()), self.provenance.get("model", {}).get("id")
        return f"{type(self).__name__}({name!r}, {len(self.blocks)} blocks, {analysed} matrices analysed)"

    @cached_property
    def _measured(self) -> pd.DataFrame:
        return aggregate_blocks(self.frame, self.block_lod, self.provenance.get("model", {}).get("num_blocks"))


def aggregate_blocks(frame: pd.DataFrame, block_lod: BlockLod, num_blocks: int | None = None) -> pd.DataFrame:
    """Collect the numbers of each block from the rows of its matrices.

    Args:
        frame: a row a matrix. The parts of a fused matrix are left out, since the fused matrix is counted.
        block_lod: LOD of the blocks where it was measured, as in `ScanData`.
        num_blocks: number of blocks; None takes those that the frame has.

    Returns:
        A row a block. `alpha`, `alpha_hill` and `stable_rank` are means over its matrices; LOD is pooled; `log10_norm`
        is log10 of the summed squares of its matrices (not a mean of logarithms); `matrices` counts those analysed,
        `parameters` every number in the block. NaN where nothing is known.
    """
    inside = frame[frame["block"].notna()]
    if "part_of" in inside:
        inside = inside[inside["part_of"] == ""]
    groups = {int(index): rows for index, rows in inside.groupby("block")}
    indexes = range(num_blocks) if num_blocks is not None else sorted(groups)
    records = [_block_row(index, groups.get(index, inside.iloc[:0]), block_lod.get(index, {})) for index in indexes]
    further = [name for name in frame.columns if is_tau_column(name)]
    blocks = pd.DataFrame.from_records(records, columns=[*BLOCK_COLUMNS[:9], *further])
    return blocks.astype(
        {name: "int64" if name in ("block", "matrices", "parameters") else "float64" for name in blocks.columns}
    )


def with_shares(blocks: pd.DataFrame, table: LayerTable | None) -> pd.DataFrame:
    """Add the scores and shares of a layer table to the rows of the blocks.

    Args:
        blocks: a row a block.
        table: a table of the same depth; None leaves the columns NaN.

    Returns:
        The rows with `score`, `probability` and `inclusion`; LOD at further taus comes last.

    Raises:
        BadInput: the table has another number of blocks.
    """
    if table is not None and table.num_blocks != len(blocks):
        raise BadInput(
            f"table: got {table.num_blocks} blocks, expected {len(blocks)}, the model's; make it from this scan"
        )
    shares = {name: np.nan if table is None else getattr(table, name) for name in BLOCK_COLUMNS[9:]}
    further = [name for name in blocks.columns if is_tau_column(name)]
    return blocks.assign(**shares)[[*BLOCK_COLUMNS, *further]]


def _block_row(index: int, rows: pd.DataFrame, measured: Mapping[str, float]) -> dict[str, Any]:
    sizes = rows["rows"].astype(float) * rows["cols"].astype(float)
    lod = {name: measured.get(name, np.nan) for name in rows.columns if name in LOD_COLUMNS or is_tau_column(name)}
    for name, value in lod.items():
        if np.isnan(value):
            lod[name] = _pooled(rows[name].astype(float), sizes)
    squares = (10.0 ** rows["log10_norm"].astype(float)).sum(min_count=1)
    return {
        "block": index,
        "alpha": rows["alpha"].astype(float).mean(),
        "alpha_hill": rows["alpha_hill"].astype(float).mean(),
        **lod,
        "log10_norm": np.log10(squares) if squares > 0 else np.nan,
        "stable_rank": rows["stable_rank"].astype(float).mean(),
        "matrices": int((rows["status"] == "ok").sum()),
        "parameters": int(sizes.sum()),
    }


def _pooled(percents: pd.Series, sizes: pd.Series) -> float:
    """The LOD of a block from that of its matrices: their mean, weighed by the number of weights."""
    known = percents.notna()
    return float((percents[known] * sizes[known]).sum() / sizes[known].sum()) if known.any() else float("nan")

"""Pictures of two scans side by side: alpha by depth, what moved where, how far leading directions are shared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from htsr.plots import BLUE, ORANGE, depth_axis, draw_grid, grid_axes, new_axes, role_grid, style

if TYPE_CHECKING:
    from htsr.scan_data import ScanData


def blocks_side_by_side(a: pd.DataFrame, b: pd.DataFrame, ax: Axes, value: str = "alpha") -> Axes:
    """A number of every block of two scans, by depth."""
    for blocks, colour, name in ((a, BLUE, "a"), (b, ORANGE, "b")):
        ax.plot(blocks["block"], blocks[value], color=colour, lw=1.8, marker="o", ms=4, label=name)
    depth_axis(ax, max(a["block"].max(), b["block"].max()))
    return style(ax, f"{value} of the blocks of both scans", value, legend=True)


def by_role(matrices: pd.DataFrame, value: str, ax: Axes) -> Axes:
    """A number of every compared matrix by block and role; differences around a neutral middle, shares from 0 to 1."""
    grid = role_grid(matrices, value)
    if value.startswith("overlap"):
        title = f"How far leading {value.removeprefix('overlap_')} are shared"
        draw_grid(grid, ax, value, title, cmap="viridis", vmin=0.0, vmax=1.0)
    else:
        limit = float(np.nanmax(np.abs(grid.to_numpy()))) or 1.0
        title = f"{value.removesuffix('_diff')} of b less that of a"
        draw_grid(grid, ax, value, title, cmap="RdBu_r", vmin=-limit, vmax=limit)
    return ax


def comparison_pictures(a: ScanData, b: ScanData, matrices: pd.DataFrame) -> dict[str, Axes]:
    """name -> picture, for every one that there are numbers for."""
    drawn: dict[str, Axes] = {}
    for value in ("alpha", "lod"):
        if all(len(r.blocks) and r.blocks[value].notna().any() for r in (a, b)):
            drawn[value] = blocks_side_by_side(a.blocks, b.blocks, new_axes(), value)
    for value in ("alpha_diff", "lod_diff", "overlap_outputs", "overlap_inputs"):
        if value in matrices and (matrices["block"].notna() & matrices[value].notna()).any():
            roles = matrices[matrices["block"].notna()]["role"].nunique()
            drawn[value] = by_role(matrices, value, grid_axes(roles))
    return drawn

"""Pictures of two scans side by side: alpha by depth, what moved where, how far leading directions are shared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from htsr.plots import BLUE, INK, LIGHT, ORANGE, depth_axis, new_axes, role_key, style

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
    inside = matrices[matrices["block"].notna() & matrices[value].notna()]
    inside = inside.assign(role=inside["role"].str.replace(r"^experts\.\d+\.", "experts.", regex=True))
    roles = sorted(inside["role"].unique(), key=role_key)
    grid = inside.pivot_table(index="role", columns=inside["block"].astype(int), values=value).reindex(roles)
    share = value.startswith("overlap")
    limit = 1.0 if share else float(np.nanmax(np.abs(grid.to_numpy()))) or 1.0
    columns = grid.columns.to_numpy()
    edges = np.append(columns, columns[-1] + 1) - 0.5
    mesh = ax.pcolormesh(
        edges,
        np.arange(len(roles) + 1) - 0.5,
        grid,
        cmap="viridis" if share else "RdBu_r",
        vmin=0.0 if share else -limit,
        vmax=limit,
    )
    ax.set_yticks(range(len(roles)), roles)
    ax.invert_yaxis()
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.015)
    bar.set_label(value, color=INK)
    bar.outline.set_visible(False)
    title = f"How far leading {value.removeprefix('overlap_')} are shared"
    style(ax, title if share else f"{value.removesuffix('_diff')} of b less that of a", "", grid=False)
    ax.set_facecolor(LIGHT)
    ax.set_xlabel("block", color=INK)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def comparison_pictures(a: ScanData, b: ScanData, matrices: pd.DataFrame) -> dict[str, Axes]:
    """name -> picture, for every one that there are numbers for."""
    drawn: dict[str, Axes] = {}
    for value in ("alpha", "lod"):
        if all(len(r.blocks) and r.blocks[value].notna().any() for r in (a, b)):
            drawn[value] = blocks_side_by_side(a.blocks, b.blocks, new_axes(), value)
    for value in ("alpha_diff", "lod_diff", "overlap_outputs", "overlap_inputs"):
        if value in matrices and (matrices["block"].notna() & matrices[value].notna()).any():
            inside = matrices[matrices["block"].notna()]
            drawn[value] = by_role(matrices, value, new_axes(height=1.2 + 0.32 * min(inside["role"].nunique(), 40)))
    return drawn

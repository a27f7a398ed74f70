"""Pictures of a scan: `(data, ax) -> ax`, no fitting, no global state; `Plots` binds them to a result."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from htsr.errors import BadInput, NotFound
from htsr.numerics.marchenko_pastur import noise_density
from htsr.numerics.metrics import EIGENVALUE_CUT, RELATIVE_CUT
from htsr.numerics.powerlaw import SMALL_SAMPLE
from htsr.numerics.thresholds import KsCurve, alpha_range, ks_curve

if TYPE_CHECKING:
    from matplotlib.colorbar import Colorbar
    from numpy.typing import NDArray

    from htsr.layer_table import LayerTable
    from htsr.scan_data import ScanData

INK, GREY, LIGHT = "#22303c", "#7b8794", "#d9dee3"
BLUE, ORANGE, GREEN = "#2f6fab", "#d9822b", "#3a8f6b"
# Roles in the order data flows through a block; others follow by name.
ROLE_ORDER = ("qkv", "q", "k", "v", "o", "gate_up", "gate", "up", "fc1", "down", "fc2")
KINDS = {"attention": BLUE, "MLP": ORANGE, "other": GREY}
ATTENTION = {"qkv", "q", "k", "v", "o"}
ESD_BINS = 60
PICTURES = ("alpha", "lod", "heatmap", "esd", "ks", "table")  # methods of `Plots`, in the order of the report


def alpha_by_depth(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Power-law exponent of every matrix (dots, by kind) and each block's mean (line), by depth."""
    inside = frame[frame["block"].notna() & frame["alpha"].notna()]
    blocks, alpha = inside["block"].astype(int), inside["alpha"].astype(float)
    x = blocks + _spread(inside["role"])
    kinds = inside["role"].map(_kind)
    ax.axhspan(2, 6, color=BLUE, alpha=0.08, lw=0, label="2 to 6")
    for kind, colour in KINDS.items():
        if (kinds == kind).any():
            ax.scatter(x[kinds == kind], alpha[kinds == kind], s=17, color=colour, alpha=0.65, lw=0, label=kind)
    counted = inside["part_of"] == "" if "part_of" in inside else blocks >= 0  # parts are in their fused matrix
    means = alpha[counted].groupby(blocks[counted]).mean()
    ax.plot(means.index, means, color=INK, lw=1.8, marker="o", ms=4, label="block mean")
    depth_axis(ax, blocks)
    top = max(1.15 * float(np.percentile(alpha, 98)), 1.05 * float(means.max()))
    ax.set_ylim(min(1.0, float(alpha.min())), top)
    if beyond := int((alpha > top).sum()):
        note = f"{beyond} {'matrix lies' if beyond == 1 else 'matrices lie'} above, up to {alpha.max():.1f}"
        ax.annotate(note, (0, 1), xycoords="axes fraction", xytext=(6, -5), textcoords="offset points",
                    va="top", color=GREY, fontsize=8)  # fmt: skip
    return style(ax, "How heavy-tailed each block is", "alpha (smaller = heavier tail)", legend=True)


def lod_by_depth(blocks: pd.DataFrame, ax: Axes) -> Axes:
    """Share of outlying weights of every block in percent, with input norms (bars) and by weights alone (dots)."""
    ax.bar(blocks["block"], blocks["lod"], width=0.74, color=ORANGE, label="weights x input norms")
    if blocks["lod_weight"].notna().any():
        ax.plot(blocks["block"], blocks["lod_weight"], ls="", marker="o", ms=4.5, color=INK, clip_on=False,
                label="weights alone", zorder=3)  # fmt: skip
    depth_axis(ax, blocks["block"])
    ax.set_ylim(bottom=0)
    return style(ax, "How many outliers each block holds", "LOD in percent", legend=True)


def heatmap(frame: pd.DataFrame, ax: Axes, value: str = "alpha") -> Axes:
    """A number of every matrix by block (across) and role (down), experts as their mean; blank where there is none."""
    grid = role_grid(frame, value)
    low, high = np.nanpercentile(grid.to_numpy(), [2, 98])
    bar = draw_grid(grid, ax, value, f"{value} of every matrix", extend="both", cmap="viridis_r", vmin=low, vmax=high)
    bar.ax.tick_params(labelsize=8.5, color=LIGHT, labelcolor=INK)
    if grid.size <= 140:  # few enough for numbers to be read
        for (row, column), number in np.ndenumerate(grid.to_numpy()):
            dark = number > low + 0.36 * (high - low)  # where viridis darkens
            ax.text(grid.columns[column], row, f"{number:.2f}" if np.isfinite(number) else "", ha="center", va="center",
                    fontsize=8, color="white" if dark else INK)  # fmt: skip
    return ax


def role_grid(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """A number of the matrices inside the blocks as a table of roles (rows) and blocks (columns).

    Args:
        frame: a row a matrix, as in scan.csv.
        value: the column of the number; the experts of a block are averaged.

    Returns:
        The table; a cell is NaN where no matrix has the number.
    """
    inside = frame[frame["block"].notna() & frame[value].notna()]
    inside = inside.assign(role=inside["role"].str.replace(r"^experts\.\d+\.", "experts.", regex=True))
    roles = sorted(inside["role"].unique(), key=role_key)
    return inside.pivot_table(index="role", columns=inside["block"].astype(int), values=value).reindex(roles)


def draw_grid(
    grid: pd.DataFrame, ax: Axes, label: str, title: str, *, extend: str = "neither", **mesh: Any
) -> Colorbar:
    """Draw a `role_grid` as coloured cells.

    Args:
        grid: the numbers, at least one role and one block.
        ax: where the cells are drawn.
        label: the text beside the colour bar.
        title: the text above the cells.
        extend: which ends of the colour bar are pointed, as matplotlib takes it.
        mesh: colour map and limits, as `Axes.pcolormesh` takes them.

    Returns:
        The colour bar.
    """
    blocks = grid.columns.to_numpy()
    cells = ax.pcolormesh(np.append(blocks, blocks[-1] + 1) - 0.5, np.arange(len(grid) + 1) - 0.5, grid, **mesh)
    ax.set_yticks(range(len(grid)), grid.index)
    ax.invert_yaxis()
    bar = ax.figure.colorbar(cells, ax=ax, pad=0.015, extend=extend)
    bar.set_label(label, color=INK)
    bar.outline.set_visible(False)
    style(ax, title, "", grid=False)
    ax.set_facecolor(LIGHT)
    ax.set_xlabel("block", color=INK)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return bar


def grid_axes(roles: int) -> Axes:
    """A new Axes that is high enough for a grid of this many roles."""
    return new_axes(height=1.2 + 0.32 * min(roles, 40))


def esd(eigenvalues: NDArray[np.float64], fit: Mapping[str, Any], ax: Axes, title: str = "") -> Axes:
    """Draw the density of the eigenvalues on log axes, the fitted power law and where its tail begins.

    Args:
        eigenvalues: of W^T W, shape (n,).
        fit: `alpha`, `xmin`, `n_tail` and `ks_d` as in a row of the scan; NaN draws no fit. With `rows`, `cols` and
            the columns of --nulls also the noise in it.
        ax: where the picture is drawn.
        title: the text above it.
    """
    positive = eigenvalues[eigenvalues > max(1e-12 * eigenvalues.max(), 1e-30)]
    if len(positive) == 0:
        raise BadInput("spectrum: got no positive eigenvalue, expected some to draw")
    bins = np.geomspace(positive.min(), positive.max() * 1.001, min(ESD_BINS, 8 + len(positive) // 6))  # exact ends
    density, _ = np.histogram(positive, bins=bins, density=True)
    middle = np.sqrt(bins[:-1] * bins[1:])
    seen = density > 0
    ax.stairs(
        np.where(seen, density, np.nan), bins, color=BLUE, fill=True, alpha=0.25, baseline=density[seen].min() / 3
    )
    ax.plot(middle[seen], density[seen], ls="", marker="o", ms=3, color=BLUE)
    _noise(fit, bins, density[seen].min() / 3, len(eigenvalues), ax)
    _tail(positive, fit, ax)
    log_axis(ax, positive)
    ax.set_yscale("log")
    ax.set_xlabel("eigenvalue = singular value squared", color=INK)
    room = 12 if np.isnan(float(fit.get("mp_edge", np.nan))) else 60  # for the legend above the densest bin
    ax.set_ylim(density[seen].min() / 3, density[seen].max() * room)
    return style(ax, title or "Spectrum", "density")


def _tail(positive: NDArray[np.float64], fit: Mapping[str, Any], ax: Axes) -> None:
    """The fitted power law over its tail, scaled to the tail's share of all eigenvalues."""
    alpha, xmin = float(fit["alpha"]), float(fit["xmin"])
    if not (np.isfinite(alpha) and np.isfinite(xmin)):
        return
    x = np.geomspace(xmin, positive.max(), 100)
    share = (positive >= xmin).mean()
    label = f"alpha = {alpha:.2f}\n{int(fit['n_tail'])} of {len(positive)} values, D = {float(fit['ks_d']):.3f}"
    ax.plot(x, share * (alpha - 1) / xmin * (x / xmin) ** -alpha, color=ORANGE, lw=2, label=label)
    ax.axvline(xmin, color=GREY, lw=1, ls=(0, (4, 3)))
    ax.annotate("xmin", (xmin, 0), xycoords=("data", "axes fraction"), xytext=(-3, 4),
                textcoords="offset points", ha="right", color=GREY, fontsize=8)  # fmt: skip
    ax.legend(fontsize=8.5, labelcolor=INK, loc="upper right", borderpad=0.2, handlelength=1.2, edgecolor="none",
              framealpha=0.85)  # fmt: skip


def _noise(fit: Mapping[str, Any], bins: NDArray[np.float64], floor: float, total: int, ax: Axes) -> None:
    """The Marchenko-Pastur law of the fitted noise, and its edge with the number of spikes beyond."""
    edge, sigma = (float(fit.get(name, np.nan)) for name in ("mp_edge", "mp_sigma"))
    if not edge > bins[0]:
        return
    x = np.geomspace(bins[0], edge, 400)
    density = noise_density(x, sigma, int(fit["rows"]), int(fit["cols"]))
    ax.plot(x, np.where(density > floor, density, np.nan), color=INK, lw=1.3, alpha=0.75)
    label = f"noise and its edge,\n{int(fit['num_spikes'])} of {total} values beyond"
    ax.axvline(edge, color=INK, lw=1.3, alpha=0.75, ls=(0, (1, 2)), label=label)


def ks_by_xmin(curve: KsCurve, ax: Axes, title: str = "") -> Axes:
    """Kolmogorov-Smirnov distance against xmin, with the band of 5 % above the best and the alphas inside it."""
    best = int(np.argmin(curve.ks_d))
    near = curve.near_best
    limit = 1.05 * float(curve.ks_d[best])
    ax.axhspan(float(curve.ks_d[best]), limit, color=ORANGE, alpha=0.18, lw=0)
    ax.plot(curve.xmin, curve.ks_d, color=BLUE, lw=1.3)
    low, high = alpha_range(curve)
    label = f"within 5 % of the best: {int(near.sum())} of {len(near)} xmin,\nalpha {low:.2f} to {high:.2f}"
    ax.plot(curve.xmin[near], curve.ks_d[near], ls="", marker="o", ms=4, color=ORANGE, label=label)
    ax.plot(curve.xmin[best], curve.ks_d[best], ls="", marker="o", ms=6, mfc="none", color=INK, mew=1.4,
            label=f"best: alpha {curve.alpha[best]:.2f}")  # fmt: skip
    log_axis(ax, curve.xmin)
    ax.set_ylim(0, 1.32 * float(curve.ks_d.max()))
    ax.set_xlabel("xmin, an eigenvalue", color=INK)
    style(ax, title or "How well each xmin fits", "KS distance")
    ax.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper left", borderpad=0.2, handlelength=1.2)
    return ax


def table_bars(table: LayerTable, ax: Axes) -> Axes:
    """Inclusion (chance that a draw of gamma blocks holds it) and probability (share of the scores) by block."""
    ax.bar(table.index, table.inclusion, width=0.74, color=GREEN, alpha=0.85, label=f"inclusion (sum {table.gamma})")
    ax.bar(table.index, table.probability, width=0.34, color=INK, label="probability (sum 1)")
    uniform = table.gamma / table.num_blocks
    ax.axhline(uniform, color=GREY, lw=1.2, ls=(0, (4, 3)), label=f"uniform ({uniform:.2f})")
    depth_axis(ax, table.index)
    ax.set_ylim(0, min(1.02, 1.12 * float(table.inclusion.max())))
    return style(ax, f"Layer table, rule {table.rule.get('name')}", "share of draws", legend=True)


@dataclass(frozen=True)
class Plots:
    """The pictures of one scan. Each method draws on an Axes and returns it.

    Attributes:
        result: the scan.
    """

    result: ScanData

    def alpha(self, ax: Axes | None = None) -> Axes:
        """Draw the power-law exponents by depth.

        Args:
            ax: where it is drawn; None makes a new figure.
        """
        return alpha_by_depth(self.result.frame, ax or new_axes())

    def lod(self, ax: Axes | None = None) -> Axes:
        """Draw the outliers by depth.

        Args:
            ax: where it is drawn; None makes a new figure.

        Raises:
            BadInput: the scan has no LOD.
        """
        if not self.has("lod"):
            raise BadInput("this scan has no LOD, expected a calibrated one; scan with a calibration text")
        return lod_by_depth(self.result.blocks, ax or new_axes())

    def heatmap(self, value: str = "alpha", ax: Axes | None = None) -> Axes:
        """Draw a number of every matrix by block and role.

        Args:
            value: a column of the scan's frame.
            ax: where it is drawn; None makes a new figure.
        """
        inside = self.result.frame[self.result.frame["block"].notna() & self.result.frame["alpha"].notna()]
        return heatmap(self.result.frame, ax or grid_axes(max(1, inside["role"].nunique())), value)

    def esd(self, tensor: str | None = None, ax: Axes | None = None) -> Axes:
        """Draw the spectrum of a matrix with its fit.

        Args:
            tensor: name of the matrix; None draws the heaviest, the middle and the lightest tail on a new figure.
            ax: where it is drawn; None makes a new figure.

        Raises:
            NotFound: this scan has no spectrum of such a matrix.
        """
        if tensor is None:
            return self._three(self.esd, self._ranked())
        rows = self.result.frame.set_index("tensor")
        return esd(self._spectrum(tensor), rows.loc[tensor], ax or new_axes(), tensor)

    def ks(self, tensor: str | None = None, ax: Axes | None = None) -> Axes:
        """Draw the Kolmogorov-Smirnov distance of every possible xmin of a matrix.

        Args:
            tensor: name of the matrix; None draws the heaviest, the middle and the lightest tail on a new figure.
            ax: where it is drawn; None makes a new figure.

        Raises:
            NotFound: this scan has no spectrum of such a matrix.
            BadInput: the matrix has fewer than 20 eigenvalues above the cut.
        """
        if tensor is None:
            return self._three(self.ks, self._enough())
        values = self._fitted(tensor)
        curve = ks_curve(values)
        if not len(curve.xmin):
            raise BadInput(f"{tensor}: got {len(values)} eigenvalues above the cut, expected at least {SMALL_SAMPLE}")
        return ks_by_xmin(curve, ax or new_axes(), tensor)

    def table(self, table: LayerTable | None = None, ax: Axes | None = None) -> Axes:
        """Draw a layer table.

        Args:
            table: the table; None is the default one of this scan.
            ax: where it is drawn; None makes a new figure.
        """
        return table_bars(table or self.result.table(), ax or new_axes())

    def has(self, name: str) -> bool:
        """Whether the scan holds the numbers of a picture.

        Args:
            name: one of PICTURES.
        """
        frame, blocks = self.result.frame, self.result.blocks
        match name:
            case "alpha" | "heatmap":
                return bool((frame["block"].notna() & frame["alpha"].notna()).any())
            case "lod":
                return bool(blocks["lod"].notna().any())
            case "ks":
                return bool(self._enough())
            case "esd":
                return bool(self.result.spectra) and bool(self._ranked())
            case _:
                return len(blocks) > 0

    def _ranked(self) -> list[str]:
        """Names of matrices with a spectrum and an alpha, the heaviest tail first."""
        known = self.result.frame[self.result.frame["alpha"].notna()].sort_values("alpha")
        return [name for name in known["tensor"] if name in (self.result.spectra or {})]

    def _spectrum(self, tensor: str) -> NDArray[np.float64]:
        if self.result.spectra is None or tensor not in self.result.spectra:
            raise NotFound(f"got {tensor!r}, expected the name of an analysed matrix, such as {self._ranked()[:1]}")
        return self.result.spectra[tensor]

    def _fitted(self, tensor: str) -> NDArray[np.float64]:
        """The eigenvalues that the fit of `tensor` saw."""
        values = self._spectrum(tensor)
        xmin = float(self.result.frame.set_index("tensor").loc[tensor, "xmin"])
        small = xmin <= EIGENVALUE_CUT  # only differences of weights have a tail there; their cut is relative
        return values[values > (RELATIVE_CUT * values[-1] if small else EIGENVALUE_CUT)]

    def _enough(self) -> list[str]:
        """The ranked names with enough eigenvalues for a choice of xmin."""
        return [name for name in self._ranked() if len(self._fitted(name)) >= SMALL_SAMPLE]

    def _three(self, draw: Callable[[str, Axes], Axes], names: Sequence[str]) -> Axes:
        """The heaviest, the middle and the lightest tail of the ranked `names`."""
        if not names:
            raise NotFound("this scan kept no spectra, expected some to draw; scan again")
        chosen = list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
        figure = Figure(figsize=(4.2 * len(chosen), 3.6), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(chosen)))
        for name, panel in zip(chosen, panels, strict=True):
            draw(name, panel)
            panel.set_title(name.removesuffix(".weight"), fontsize=9, color=INK, loc="left")
        return panels[0]


def pictures(scan: ScanData) -> dict[str, bytes]:
    """name -> PNG of every picture that the scan has numbers for."""
    plot = Plots(scan)
    return {name: picture(getattr(plot, name)()) for name in PICTURES if plot.has(name)}


def picture(ax: Axes) -> bytes:
    """The PNG of the figure that `ax` is on."""
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})  # type: ignore[union-attr]
    return buffer.getvalue()


def new_axes(width: float = 8.0, height: float = 3.6) -> Axes:
    """An Axes on a new figure, made without pyplot."""
    return Figure(figsize=(width, height), layout="constrained").subplots()


def style(ax: Axes, title: str, ylabel: str, *, legend: bool = False, grid: bool = True) -> Axes:
    """Title, label of y, quiet spines and ticks, legend above the picture."""
    ax.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    ax.set_ylabel(ylabel, color=INK)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(LIGHT)
    ax.tick_params(colors=INK, labelsize=9, color=LIGHT)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(axis="y", color=LIGHT, lw=0.7)
    if legend:
        ax.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right", bbox_to_anchor=(1.01, 0.985), ncols=6,
                  borderpad=0.2, columnspacing=1.1, handletextpad=0.5, handlelength=1.4)  # fmt: skip
    return ax


def log_axis(ax: Axes, values: NDArray[np.float64]) -> None:
    """Logarithmic x with labels that do not overlap: at 1, 2 and 5 where `values` span little, else at powers of 10."""
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())
    if values.max() < 30 * values.min():
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def depth_axis(ax: Axes, blocks: Any) -> None:
    """Whole numbers of blocks along x."""
    last = int(np.max(blocks))
    ax.set_xlim(-0.7, last + 0.7)
    ax.set_xlabel("block (0 is nearest the input)", color=INK)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))


def _spread(roles: Sequence[str] | pd.Series) -> NDArray[np.float64]:
    """A small fixed shift for each role, so that the dots of a block do not hide each other."""
    codes = pd.Categorical(roles, categories=sorted(set(roles), key=role_key)).codes.astype(float)
    return (codes / max(1.0, codes.max()) - 0.5) * 0.5 if len(codes) else codes


def _kind(role: str) -> str:
    leaf = role.rpartition(".")[2].removeprefix("cross_")
    if leaf in ATTENTION:
        return "attention"
    return "MLP" if leaf in ROLE_ORDER else "other"


def role_key(role: str) -> tuple[int, str]:
    """Sorts roles in the order that data flows through a block, unknown ones last by name."""
    return (ROLE_ORDER.index(role) if role in ROLE_ORDER else len(ROLE_ORDER), role)

"""Pictures: what is drawn is what the numbers say, on any Axes, without global state."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from makers import scan_rows as rows
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from htsr.errors import BadInput, NotFound
from htsr.layer_table import LayerTable
from htsr.numerics.thresholds import ks_curve
from htsr.plots import esd, ks_by_xmin, new_axes
from htsr.result import ScanResult


@pytest.fixture
def result() -> ScanResult:
    frame = rows(
        block=[0, 0, 1, 1, pd.NA],
        tensor=["a", "b", "c", "d", "e"],
        role=["q", "up", "q", "up", "head"],
        alpha=[2.0, 4.0, 3.0, np.nan, 7.0],
        ks_d=[0.1, 0.1, 0.1, np.nan, 0.1],
        xmin=[1.0, 1.0, 1.0, np.nan, 1.0],
        n_tail=[50, 50, 50, pd.NA, 50],
        lod=[0.1, 0.3, 0.2, 0.2, np.nan],
        lod_weight=[0.0, 0.1, 0.0, 0.1, np.nan],
    )
    values = np.sort(1 + np.random.default_rng(0).pareto(2.0, 300))
    return ScanResult(frame=frame, provenance={}, spectra={"a": values, "b": values, "e": values})


def test_alpha_shows_every_matrix_and_the_mean_of_each_block(result: ScanResult) -> None:
    ax = result.plot.alpha()
    line = next(li for li in ax.lines if li.get_label() == "block mean")
    assert line.get_xydata().tolist() == [[0, 3], [1, 3]]
    assert sorted(y for c in ax.collections for y in c.get_offsets()[:, 1] if len(c.get_offsets()) < 4)[-3:] == [
        2,
        3,
        4,
    ]
    assert "alpha" in ax.get_ylabel()
    assert "block" in ax.get_xlabel()


def test_lod_bars_are_the_blocks_lod_in_percent(result: ScanResult) -> None:
    ax = result.plot.lod()
    assert [bar.get_height() for bar in ax.patches] == pytest.approx(result.blocks["lod"].tolist())
    assert "percent" in ax.get_ylabel()


def test_heatmap_has_a_cell_for_every_matrix_in_a_block(result: ScanResult) -> None:
    ax = result.plot.heatmap()
    cells = ax.collections[0].get_array()
    assert np.array_equal(np.ma.filled(cells, np.nan), [[2, 3], [4, np.nan]], equal_nan=True)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["q", "up"]


def test_esd_line_is_the_fitted_density(result: ScanResult) -> None:
    ax = result.plot.esd("a")
    line = next(li for li in ax.lines if "alpha" in str(li.get_label()))
    x, y = line.get_xydata().T
    share = np.mean(result.spectra["a"] >= 1.0)
    assert y == pytest.approx(share * x**-2.0)  # (alpha - 1) / xmin * (x / xmin)^-alpha with alpha 2, xmin 1
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert len(result.plot.esd().figure.axes) == 3


def test_esd_of_a_matrix_without_a_fit_shows_the_spectrum_alone() -> None:
    ax = esd(np.linspace(1, 2, 50), {"alpha": np.nan, "xmin": np.nan}, new_axes())
    assert ax.get_legend() is None
    with pytest.raises(BadInput, match="no positive eigenvalue"):
        esd(np.zeros(4), {"alpha": np.nan, "xmin": np.nan}, new_axes())


def test_table_bars_are_inclusions_and_probabilities(result: ScanResult) -> None:
    table = LayerTable.build([3.0, 1.0], 1)
    heights = [bar.get_height() for bar in result.plot.table(table).patches]
    assert heights == pytest.approx([0.75, 0.25, 0.75, 0.25])


def test_any_axes_can_be_drawn_on_and_is_returned(result: ScanResult) -> None:
    panels = Figure().subplots(2, 2).ravel()
    drawn = [result.plot.alpha(panels[0]), result.plot.lod(panels[1]), result.plot.table(ax=panels[2])]
    assert [a is b for a, b in zip(drawn, panels, strict=False)] == [True] * 3


def test_missing_numbers_are_said_and_not_drawn() -> None:
    bare = ScanResult(frame=rows(block=[0], tensor=["a"], alpha=[2.0]), provenance={})
    assert [name for name in ("alpha", "lod", "heatmap", "esd", "table") if bare.plot.has(name)] == [
        "alpha",
        "heatmap",
        "table",
    ]
    with pytest.raises(BadInput, match="no LOD"):
        bare.plot.lod()
    with pytest.raises(NotFound, match="spectra"):
        bare.plot.esd()
    with pytest.raises(NotFound, match="analysed matrix"):
        bare.plot.esd("a")


def test_drawing_never_touches_pyplot() -> None:
    program = (
        "import sys, numpy as np; from htsr.plots import esd, new_axes; "
        "esd(np.arange(1., 60), {'alpha': 2., 'xmin': 1., 'n_tail': 59, 'ks_d': .1}, new_axes()); "
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize("span", [2.0, 9.0, 18.0, 1e5])
def test_labels_of_eigenvalues_are_few_and_at_least_two(span: float) -> None:
    values = np.geomspace(0.4, 0.4 * span, 80)
    row = {"alpha": 3.0, "xmin": values[40], "n_tail": 40, "ks_d": 0.1}
    for ax in (esd(values, row, new_axes(width=4.2)), ks_by_xmin(ks_curve(values), new_axes(width=4.2))):
        FigureCanvasAgg(ax.figure).draw()
        low, high = ax.get_xlim()
        ticks = [*ax.xaxis.get_major_ticks(), *ax.xaxis.get_minor_ticks()]
        shown = [t for t in ticks if t.label1.get_text() and low <= t.get_loc() <= high]
        boxes = sorted((t.label1.get_window_extent().x0, t.label1.get_window_extent().x1) for t in shown)
        assert len(boxes) >= 2
        assert all(first[1] < second[0] for first, second in pairwise(boxes))


@pytest.mark.parametrize("smallest", [1.7e-5, 0.1, 0.27, 0.3, 1.1, 7.3, 123.4])
def test_the_smallest_eigenvalue_is_in_the_first_bin(smallest: float) -> None:
    values = np.concatenate([[smallest], np.geomspace(50 * smallest, 5000 * smallest, 60)])
    ax = esd(values, {"alpha": np.nan, "xmin": np.nan, "n_tail": 0, "ks_d": np.nan}, new_axes())
    assert ax.lines[0].get_xdata()[0] < 2 * smallest

"""What `htsr.scan` returns: the plain record with its pictures, its files and its view in a notebook."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from htsr.report import notebook_html
from htsr.scan_data import ScanData
from htsr.store import read_scan, save_scan

if TYPE_CHECKING:
    from htsr.plots import Plots


class ScanResult(ScanData):
    """A scanned model that can be drawn, saved and shown; `ScanData` says what it holds."""

    @property
    def plot(self) -> Plots:
        """Pictures: `.plot.alpha()`, `.lod()`, `.heatmap()`, `.esd(tensor)`, `.table()`; each returns its Axes."""
        from htsr.plots import Plots

        return Plots(self)

    def save(self, directory: str | Path, *, plots: bool = True) -> Path:
        """Write scan.csv, blocks.csv, table.json, scan.json, spectra.npz, report.html and plots/ to `directory`.

        Files appear whole or not at all; files of that name are replaced, others are left alone.
        """
        return save_scan(self, Path(directory), plots=plots)

    def _repr_html_(self) -> str:
        return notebook_html(self)


def load_scan(directory: str | Path) -> ScanResult:
    """The scan in a directory that `ScanResult.save` wrote.

    Raises:
        NotFound: no such directory.
        BadInput: not the files of a scan.
    """
    data = read_scan(Path(directory))
    return ScanResult(frame=data.frame, provenance=data.provenance, spectra=data.spectra, calibration=data.calibration)

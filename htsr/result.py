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
    """A scanned model that can be drawn, saved and shown.

    Attributes:
        frame: a row a tensor; the columns of scan.csv.
        provenance: what scan.json holds: model, settings, calibration, versions, seconds, peak_bytes.
        spectra: tensor name -> eigenvalues, ascending, where they were kept.
        block_lod: block index -> column -> percent of outliers, pooled over the block; see `ScanData`.
    """

    @property
    def plot(self) -> Plots:
        """Pictures: `.plot.alpha()`, `.lod()`, `.heatmap()`, `.esd(tensor)`, `.table()`; each returns its Axes."""
        from htsr.plots import Plots

        return Plots(self)

    def save(self, directory: str | Path, *, plots: bool = True) -> Path:
        """Write scan.csv, blocks.csv, table.json, scan.json, spectra.npz, report.html and plots/ to `directory`.

        Files appear whole or not at all; files of that name are replaced, others are left alone.

        Args:
            directory: where the files go; it is made when it does not exist.
            plots: draws the PNGs of plots/; without them those of an earlier scan are removed.

        Returns:
            The directory.

        Raises:
            UsageError: the directory cannot be written to.
        """
        return save_scan(self, Path(directory), plots=plots)

    def _repr_html_(self) -> str:
        return notebook_html(self)


def load_scan(directory: str | Path) -> ScanResult:
    """Read the scan in a directory that `ScanResult.save` or `htsr scan` wrote.

    Args:
        directory: the directory with scan.csv and scan.json.

    Returns:
        The result, with the same numbers to the last bit.

    Raises:
        NotFound: there is no such directory.
        BadInput: the directory does not hold the files of a scan.
    """
    data = read_scan(Path(directory))
    return ScanResult(frame=data.frame, provenance=data.provenance, spectra=data.spectra, block_lod=data.block_lod)

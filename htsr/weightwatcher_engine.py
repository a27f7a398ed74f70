"""weightwatcher as a second engine: its numbers in the columns of the scan. It is imported only when it is used."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.cache import Analyse
from htsr.console import quiet_libraries
from htsr.errors import HtsrError
from htsr.matrix_row import empty_row
from htsr.model.reading import read_slice
from htsr.numerics.metrics import alpha_hill
from htsr.numerics.spectrum import MatrixSlice

if TYPE_CHECKING:
    from htsr.model.layers import LayerView
    from htsr.model.source import Source

# column of the scan -> weightwatcher's
SAME = {
    "alpha": "alpha", "ks_d": "D", "xmin": "xmin", "n_tail": "num_pl_spikes", "alpha_sigma": "sigma",
    "alpha_hat": "alpha_weighted", "log10_norm": "log_norm", "log10_spectral_norm": "log_spectral_norm",
    "lambda_max": "lambda_max", "stable_rank": "stable_rank", "entropy": "entropy",
}  # fmt: skip
OF_THE_FIT = ("alpha", "ks_d", "xmin", "n_tail", "alpha_sigma", "alpha_hat")
LEFT_OUT = "left out by weightwatcher: more than 15000 eigenvalues or a side above 50000"
FIT_FAILED = "weightwatcher's fit failed"


def analyse(source: Source, view: LayerView) -> tuple[dict[str, Any], np.ndarray | None]:
    """Compute the row of a matrix with weightwatcher, from the weights in fp32.

    Args:
        source: an open model.
        view: the matrix.

    Returns:
        The row and the eigenvalues (None where there are none). `alpha_hill` is computed here from weightwatcher's
        eigenvalues.

    Raises:
        HtsrError: weightwatcher is not installed.
    """
    if view.reason:
        return empty_row(view, "skipped", view.reason), None
    start = time.perf_counter()
    weights = full_weights(source, view)
    if bad := int(weights.size - np.isfinite(weights).sum()):
        return empty_row(view, "failed", f"{bad} of {weights.size} entries are NaN or infinite"), None
    details, values = measure(weights, convolution=bool(view.pool))
    if details is None or values is None:
        return empty_row(view, "skipped", LEFT_OUT), None
    row = empty_row(view, "ok", "")
    row.update({ours: number(details[theirs]) for ours, theirs in SAME.items()})
    if details["alpha"] == -1:  # its word for a fit that failed
        row |= {**dict.fromkeys(OF_THE_FIT, np.nan), "status": "failed", "reason": FIT_FAILED}
    row["alpha_hill"] = alpha_hill(values)
    row["seconds"] = time.perf_counter() - start
    return row, values


def one_at_a_time(source: Source) -> Analyse:
    """`analyse` for several threads: it captures what weightwatcher prints, which only one can do at a time."""
    lock = threading.Lock()

    def work(view: LayerView) -> tuple[dict[str, Any], np.ndarray | None]:
        with lock:
            return analyse(source, view)

    return work


def full_weights(source: Source, view: LayerView) -> np.ndarray:
    """The weights of a view in fp32, all at once: (rows, cols), or the kernel (out, in, k, k) of a convolution."""
    values = read_slice(source, view, MatrixSlice(0, view.rows)).astype(np.float32)
    return values.reshape(source.info(view.tensor).shape) if view.pool else values


def measure(weights: np.ndarray, *, convolution: bool) -> tuple[dict[str, Any] | None, np.ndarray | None]:
    """weightwatcher's details of one layer and its eigenvalues; None where it leaves the layer out."""
    import torch
    from torch import nn

    with quiet_libraries(prints=True), np.errstate(all="ignore"):
        try:
            import weightwatcher
        except ImportError as error:
            raise HtsrError("weightwatcher cannot be imported; install it: pip install weightwatcher==0.7.7") from error
        outputs, inputs = weights.shape[:2]
        layer: nn.Module = (
            nn.Conv2d(inputs, outputs, weights.shape[2:], bias=False, device="meta")
            if convolution
            else nn.Linear(inputs, outputs, bias=False, device="meta")
        )
        layer.weight = nn.Parameter(torch.from_numpy(weights), requires_grad=False)
        watcher = weightwatcher.WeightWatcher(model=nn.Sequential(layer))
        table = watcher.analyze()
        if not len(table):
            return None, None
        found = dict(table.iloc[0])
        values = np.sort(np.asarray(watcher.get_ESD(layer=int(found["layer_id"])), dtype=np.float64))
        return found, values / 2 if convolution else values  # get_ESD leaves out the sqrt(1/2) that analyze applies


def number(value: Any) -> float:
    """A number of weightwatcher's as a float; NaN when it is missing or infinite, like the logarithm of a zero norm."""
    return float(value) if value is not None and np.isfinite(value) else float("nan")

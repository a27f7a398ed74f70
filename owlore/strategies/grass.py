"""GRASS: draws that follow the gradient norms which training itself shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from owlore.options import MethodOption, number
from owlore.sampling import inclusion
from owlore.strategies.base import SAMPLING, PeriodStats, Sampled

FLOOR_SHARE = 0.25  # of uniform inclusion, where --floor says nothing


class Grass(Sampled):
    """Draw gamma blocks every K steps by a softmax of the gradient norms seen so far; AdamW on what is drawn.

    m_l is block l's gradient norm a parameter, sqrt(|g_l|^2 / N_l), root mean square over the steps of the period;
    drawn blocks take m <- s m_new + (1 - s) m. The next table is that of the run's own table times softmax(m / tau),
    with m divided by its mean (raw norms are so small that a softmax of them is uniform). What a period saw is recorded
    with the checkpoint, so a resume draws the same blocks.

    Reference: GRASS 2026, arXiv 2604.07808; its code and constants were not found, so the defaults are ours. Further
    deviations: no probing steps, for the norms of drawn blocks come free with training (the norm is that of the whole
    batch, unprojected, before clipping); a block not seen yet counts as the mean of those seen; the norm of a block
    that is not drawn goes back towards that mean by `forget` each period; every block keeps a floor, a quarter of
    uniform inclusion unless `--floor` says otherwise.
    """

    name = "grass"
    paper = "arXiv 2604.07808"
    summary = "gamma blocks drawn by the gradient norms of earlier periods, AdamW"
    share = "gamma of L blocks"
    memory = "weights + AdamW state of gamma blocks"
    table = "uniform"
    accepted_options = SAMPLING
    defaults = {"active": 2, "every": 20}
    method_options = {
        "temperature": MethodOption(
            1.0, number(0, above=True), "tau of the softmax; lower follows the norms more steeply."
        ),
        "smoothing": MethodOption(
            0.5, number(0, above=True, below=1 + 1e-9), "Weight s of a new norm against the old one."
        ),
        "forget": MethodOption(
            0.1, number(0, below=1), "Share of its distance to the mean that an undrawn norm loses."
        ),
    }

    def next_inclusion(self, period: int, past: Sequence[PeriodStats]) -> NDArray[np.float64]:
        del period
        start, own = self.config.inclusion, self.config.options
        gamma = round(float(start.sum()))
        norms = smoothed_norms(past, self.sizes(), smoothing=own["smoothing"], forget=own["forget"])
        floor = FLOOR_SHARE * gamma / len(start) if self.config.floor is None else self.config.floor
        return inclusion(start * softmax_weights(norms, own["temperature"]), gamma, floor)

    def sizes(self) -> NDArray[np.float64]:
        """Parameters of each block."""
        return np.array([sum(p.numel() for _, p in block) for block in self.parts.blocks], dtype=np.float64)


def smoothed_norms(
    past: Sequence[PeriodStats], sizes: NDArray[np.float64], *, smoothing: float, forget: float
) -> NDArray[np.float64]:
    """m after the periods of `past`, one a block; a block that was never seen has the mean of those that were."""
    norms = np.full(len(sizes), np.nan)
    for finished in past:
        if not finished.steps:
            continue
        drawn = list(finished.blocks)
        fresh = np.array(finished.norms) / np.sqrt(sizes[drawn])
        old = np.where(np.isnan(norms[drawn]), fresh, norms[drawn])
        norms += forget * (np.nanmean(norms) - norms) if np.isfinite(norms).any() else 0.0
        norms[drawn] = smoothing * fresh + (1 - smoothing) * old
    if not np.isfinite(norms).any():
        return np.ones(len(sizes))
    return np.where(np.isnan(norms), np.nanmean(norms), norms)


def softmax_weights(norms: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """exp(m / (mean(m) tau)), largest 1; all 1 where no gradient came."""
    mean = norms.mean()
    logits = norms / (mean * temperature) if mean > 0 else np.zeros_like(norms)
    return np.exp(logits - logits.max())

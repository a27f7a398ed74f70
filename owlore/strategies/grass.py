"""GRASS: draws that follow the gradient norms of earlier periods."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from owlore.options import MethodOption, number
from owlore.sampling import inclusion
from owlore.strategies.base import PeriodStats, Sampled

FLOOR_SHARE = 0.25  # of uniform inclusion, where no --floor is given


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

    def next_inclusion(self, finished: Sequence[PeriodStats]) -> NDArray[np.float64]:
        initial, options = self.config.inclusion, self.config.options
        gamma = round(float(initial.sum()))
        sizes = np.array([sum(p.numel() for _, p in block) for block in self.parts.blocks], dtype=np.float64)
        norms = smoothed_norms(finished, sizes, smoothing=options["smoothing"], forget=options["forget"])
        floor = FLOOR_SHARE * gamma / len(initial) if self.config.floor is None else self.config.floor
        return inclusion(initial * softmax_weights(norms, options["temperature"]), gamma, floor)


def smoothed_norms(
    finished: Sequence[PeriodStats], sizes: NDArray[np.float64], *, smoothing: float, forget: float
) -> NDArray[np.float64]:
    """Smoothed gradient norms m after the finished periods.

    Args:
        finished: the finished periods in order.
        sizes: parameters of each block, of shape (blocks,).
        smoothing: weight s in (0, 1] of a new norm against the old one.
        forget: share in [0, 1) of its distance to the mean that the norm of a block loses when it is not drawn.

    Returns:
        One norm a block; a block that was never drawn has the mean of those that were, all have 1 before the first.
    """
    norms = np.full(len(sizes), np.nan)
    for period in finished:
        if not period.steps:
            continue
        drawn = period.blocks
        fresh = np.array(period.norms) / np.sqrt(sizes[drawn])
        old = np.where(np.isnan(norms[drawn]), fresh, norms[drawn])
        norms += forget * (np.nanmean(norms) - norms) if np.isfinite(norms).any() else 0.0
        norms[drawn] = smoothing * fresh + (1 - smoothing) * old
    if not np.isfinite(norms).any():
        return np.ones(len(sizes))
    return np.where(np.isnan(norms), np.nanmean(norms), norms)


def softmax_weights(norms: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """exp(m / (mean(m) tau)), divided by the largest; all are 1 where no gradient came.

    Args:
        norms: m, one a block.
        temperature: tau, above 0.
    """
    mean = norms.mean()
    logits = norms / (mean * temperature) if mean > 0 else np.zeros_like(norms)
    return np.exp(logits - logits.max())

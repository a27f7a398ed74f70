"""Whether a power-law fit is the same for every spectrum that an approximate one may stand for.

Given ascending eigenvalues y with radii r (the true ones are x_j in [y_j - r_j, y_j + r_j], ascending too). With
eta_j = -ln(1 - r_j / y_j), so that |ln x_j - ln y_j| <= eta_j, and with S_i = sum_{j>=i} ln(y_j / y_i) = n s^-1
(s = alpha - 1) for candidate i with n = N - i points:

    |S_i(x) - S_i(y)| <= H_i = sum_{j>i} eta_j + (n - 1) eta_i            =: h_i S_i
    s_i(x) in s_i(y) / (1 +- h_i)
    D_i takes the maximum over j of |1 - e^(-t_j) - (j - i) / n|, t_j = s (ln x_j - ln x_i): with a = h / (1 - h) and
    b = s (1 + a) (max_{j>=i} eta_j + eta_i) no t_j moves by more than a t_j + b, and t e^(-t) <= 1/e, hence

    |D_i(x) - D_i(y)| <= U_i = (a / (e (1 - a)) + b) e^b                                   (infinite where a >= 1/2)

So the first candidate with the smallest D(y), i*, is that of every such x if D_i(y) - U_i > D_i*(y) + U_i* for all
others. D_i(y) is bounded from below by some of its terms first and computed only where that does not decide.
Where U_i is useless (y_i is not far above its radius) the unknown u = ln x_i is cut into cells, and in each cell
every term of D_i is bounded by interval arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from htsr.numerics.powerlaw import candidate, lower_bounds, search

ROUNDING = 1e-11  # of a D computed in float64
COARSE = 0.02  # above this U_i is no help any more: cells decide
CELL = 0.4  # width of a cell in ln x_i
CELL_PROBES = 24


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `judge` found.

    Attributes:
        best: index of the candidate with the smallest distance; -1 where fewer than two eigenvalues are above the cut.
        alpha: the exponent at that candidate.
        alpha_error: how far alpha may be from that of the true spectrum.
        rival: the lowest index of a candidate that may be better for some spectrum within the radii; -1 when none is.
    """

    best: int
    alpha: float
    alpha_error: float
    rival: int


def judge(y: np.ndarray, radius: np.ndarray, cut: float) -> Verdict:
    """Fit an approximate spectrum, and look for candidates that its radii do not exclude.

    Args:
        y: ascending eigenvalues, shape (n,), float64.
        radius: how far each true eigenvalue may be from y, shape (n,).
        cut: eigenvalues at or below it are no candidates for xmin.

    Returns:
        The verdict, with indices into y. Where even the best candidate cannot be trusted it is its own rival.
    """
    start = int(np.searchsorted(y + radius, cut, side="right"))
    z, r = np.maximum(y[start:], cut * (1 + 1e-12)), radius[start:]
    if len(z) < 2:
        return Verdict(best=-1, alpha=np.nan, alpha_error=np.inf, rival=start)
    log_z = np.log(z)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        best, alpha, ks_d = search(z, log_z)
        errors, slopes = fit_errors(z, r, cut)
        bounds = lower_bounds(log_z)
        limit = ks_d + errors[best] + ROUNDING
        rival = _lowest_rival(z, r, cut, best, limit, bounds, errors)
    alpha_error = (alpha - 1) * slopes[best]
    if not np.isfinite(errors[best]) or z[best] - r[best] <= cut:
        rival = best if rival < 0 else min(best, rival)
    return Verdict(
        best=best + start, alpha=float(alpha), alpha_error=float(alpha_error), rival=rival + start if rival >= 0 else -1
    )


def fit_errors(y: np.ndarray, radius: np.ndarray, cut: float) -> tuple[np.ndarray, np.ndarray]:
    """(U_i, relative error of alpha_i - 1) for every candidate i; infinite where no bound can be given."""
    N = len(y)
    share = np.where(y - radius > cut, radius / y, 1.0)
    eta = np.where(share < 0.5, -np.log1p(-np.minimum(share, 0.5)), np.inf)
    n = N - np.arange(N - 1, dtype=np.float64)
    log_y = np.log(y)
    after = np.cumsum(eta[::-1])[::-1][1:]  # sum over j > i
    S = np.cumsum(log_y[::-1])[::-1][:-1] - n * log_y[:-1]
    worst = np.maximum.accumulate(eta[::-1])[::-1][:-1]
    h = np.where(S > 0, (after + (n - 1) * eta[:-1]) / np.where(S > 0, S, 1.0), np.inf)
    a = np.where(h < 1 / 3, h / (1 - np.minimum(h, 1 / 3)), np.inf)
    b = np.where(S > 0, n / np.where(S > 0, S, 1.0), np.inf) * (1 + a) * (worst + eta[:-1])
    usable = np.isfinite(a) & (b < 1)
    U = np.where(usable, (a / (np.e * (1 - np.where(usable, a, 0))) + b) * np.exp(np.where(usable, b, 0)), np.inf)
    return U, np.where(usable, a, np.inf)


def _lowest_rival(
    z: np.ndarray, r: np.ndarray, cut: float, best: int, limit: float, bounds: np.ndarray, errors: np.ndarray
) -> int:
    suspects = np.flatnonzero(~(bounds - errors > limit))
    log_z, boxes = np.log(z), None
    for i in suspects[suspects != best]:
        if errors[i] < COARSE:
            bound = candidate(z, log_z, int(i))[1] - errors[i]
        else:
            boxes = boxes or Boxes(z, r, cut)
            bound = boxes.lower_bound(int(i))
        if not bound > limit:
            return int(i)
    return -1


class Boxes:
    """Lower bounds of D_i by interval arithmetic over an uncertain spectrum."""

    def __init__(self, y: np.ndarray, radius: np.ndarray, cut: float) -> None:
        self.low, self.high = np.log(np.maximum(y - radius, cut)), np.log(y + radius)
        self.low = np.maximum.accumulate(self.low)  # the true values ascend
        self.high = np.minimum.accumulate(self.high[::-1])[::-1]
        self.low_sum = np.append(np.cumsum(self.low[::-1])[::-1], 0.0)
        self.high_sum = np.append(np.cumsum(self.high[::-1])[::-1], 0.0)

    def lower_bound(self, i: int) -> float:
        """The smallest D_i that any spectrum within the radii has."""
        N, u_low, u_high = len(self.low), self.low[i], self.high[i]
        n = float(N - i)
        cells = max(1, int(np.ceil((u_high - u_low) / CELL)))
        edges = np.linspace(u_low, u_high, cells + 1)
        u1, u2 = edges[:-1, None], edges[1:, None]
        known = np.maximum(np.searchsorted(self.low, u1), i + 1)  # from here on `low` says more than x_j >= x_i
        C_low = self.low_sum[known] + (known - i - 1) * u1
        C_high = self.high_sum[i + 1]
        S_low, S_high = np.maximum(C_low - (n - 1) * u2, 0.0), C_high - (n - 1) * u1
        s_low, s_high = n / S_high, n / np.maximum(S_low, 1e-300)
        j = i + np.floor(np.linspace(0, 1, CELL_PROBES) * (n - 1)).astype(np.int64)
        F_low = 1 - np.exp(-s_low * np.maximum(self.low[j] - u2, 0.0))
        F_high = 1 - np.exp(-np.minimum(s_high * np.maximum(self.high[j] - u1, 0.0), 700.0))
        step = (j - i) / n
        gaps = np.maximum(np.maximum(F_low - step, step - F_high), 0.0)
        return float(np.min(np.max(gaps, axis=1))) - ROUNDING

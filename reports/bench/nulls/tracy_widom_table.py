"""Computes the table in htsr/numerics/tracy_widom.py: ln P(X > s) of the Tracy-Widom law of index 1.

With q the Hastings-McLeod solution of Painleve II, q'' = s q + 2 q^3 and q ~ Ai(s) for large s,
    F1(s) = exp(-1/2 int_s^inf q(x) dx - 1/2 int_s^inf (x - s) q(x)^2 dx).
The two integrals are carried along as further equations; the integration starts at s = 12, where q is Ai to 1e-26.

    python reports/bench/nulls/tracy_widom_table.py        # prints the rows of the table
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.integrate import quad, solve_ivp
from scipy.special import airy

START, STOP, STEP = 12.0, -5.0, 0.1


def system(s: float, y: np.ndarray) -> list[float]:
    """y = (q, q', int q^2, int (x - s) q^2, int q), the integrals from s to infinity."""
    q, slope, square, _, _ = y
    return [slope, s * q + 2 * q**3, -q * q, -square, -q]


def log_survival(points: np.ndarray) -> np.ndarray:
    """ln(1 - F1) at `points`, which must fall from at most START."""

    def tail(integrand: Callable[[float], float]) -> float:
        return quad(integrand, START, 60, epsabs=0, epsrel=1e-12)[0]

    def ai(x: float) -> float:
        return float(airy(x)[0])

    start = [
        ai(START),
        float(airy(START)[1]),
        tail(lambda x: ai(x) ** 2),
        tail(lambda x: (x - START) * ai(x) ** 2),
        tail(ai),
    ]
    solved = solve_ivp(system, (START, points[-1]), start, "DOP853", points, rtol=1e-13, atol=1e-40)
    return np.log(-np.expm1(-(solved.y[3] + solved.y[4]) / 2))


if __name__ == "__main__":
    grid = np.linspace(START, STOP, round((START - STOP) / STEP) + 1)
    values = log_survival(grid)[::-1]
    for i in range(0, len(values), 8):
        print("    " + " ".join(f"{v:.7g}," for v in values[i : i + 8]))

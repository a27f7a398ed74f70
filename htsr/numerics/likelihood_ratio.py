"""Whether another law describes the tail better than a power law: Vuong's test of likelihood ratios.

All three laws live on x >= xmin and are fitted by maximum likelihood to the same tail. With y = ln(x / xmin):
    power law     alpha - 1 = 1 / mean(y)
    exponential   rate = 1 / mean(x - xmin)
    lognormal     the density of y is proportional to exp(-a y - b y^2), b > 0; b -> 0 is the power law itself
The statistic is the summed difference of log-likelihoods over its standard deviation times sqrt(n), a normal number
when both laws are equally far from the truth: positive speaks for the power law.

Reference: Vuong 1989; Clauset, Shalizi and Newman 2009, section 5.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_TAIL = 5
LEAST_CURVATURE = 1e-4  # b at a mean y of 1; below it the lognormal is the power law for any sample, and rounding rules


@dataclass(frozen=True, kw_only=True)
class LikelihoodRatio:
    """z > 0 for the power law, z < 0 for the other; p is two-sided: above 0.1 the data do not decide."""

    z: float
    p: float


def against_exponential(tail: np.ndarray, xmin: float) -> LikelihoodRatio:
    """Compare the power law with the exponential law on the points `tail` >= xmin; NaN for fewer than 5 of them."""
    if len(tail) < LEAST_TAIL:
        return LikelihoodRatio(z=np.nan, p=np.nan)
    excess = tail / xmin - 1
    mean = float(np.mean(excess))
    return _vuong(_power_law(np.log(tail / xmin)) - np.log(tail / xmin) - (-np.log(mean) - excess / mean))


def against_lognormal(tail: np.ndarray, xmin: float) -> LikelihoodRatio:
    """Compare the power law with the lognormal on the same tail.

    Args:
        tail: eigenvalues of at least xmin, shape (n,).
        xmin: where the tail begins, above 0.

    Returns:
        z = 0 and p = 1 where the best lognormal is the power law, because the tail is at least as heavy as one; NaN for
        fewer than 5 points.
    """
    if len(tail) < LEAST_TAIL:
        return LikelihoodRatio(z=np.nan, p=np.nan)
    y = np.log(tail / xmin)
    return _vuong(_power_law(y) - _lognormal(y))


def _power_law(y: np.ndarray) -> np.ndarray:
    """Log-density of y under the best power law (the Jacobian of y, the same for both, is left out)."""
    mean = float(np.mean(y))
    return -np.log(mean) - y / mean


def _lognormal(y: np.ndarray) -> np.ndarray:
    """Log-density of y under the best lognormal that is cut at xmin: a concave problem in (a, b)."""
    from scipy.optimize import minimize

    unit = float(np.mean(y))
    u = y / unit
    first, second = 1.0, float(np.mean(u**2))
    found = minimize(
        _minus_mean_log_density,
        np.array([1.0, 1e-2]),
        args=(first, second),
        jac=True,
        bounds=[(None, None), (LEAST_CURVATURE, None)],
        method="L-BFGS-B",
        options={"ftol": 1e-13, "gtol": 1e-9, "maxiter": 500},
    )
    a, b = found.x
    if b <= LEAST_CURVATURE:
        return _power_law(y)
    return -a * u - b * u**2 - _log_normaliser(a, b) - np.log(unit)


def _minus_mean_log_density(parameters: np.ndarray, first: float, second: float) -> tuple[float, np.ndarray]:
    """Its value and gradient, from the means of u and u^2."""
    a, b = parameters
    log_z = _log_normaliser(a, b)
    mean = (np.exp(-log_z) - a) / (2 * b)  # from f(0) = a + 2 b E[u]
    square = (1 - a * mean) / (2 * b)  # from E[u (a + 2 b u)] = 1
    return float(a * first + b * second + log_z), np.array([first - mean, second - square])


def _log_normaliser(a: float, b: float) -> float:
    """ln of the integral of exp(-a u - b u^2) over u > 0."""
    from scipy.special import erfcx, log_ndtr

    if a > 0:
        return float(np.log(np.sqrt(np.pi / b) / 2 * erfcx(a / (2 * np.sqrt(b)))))
    return float(np.log(np.pi / b) / 2 + a * a / (4 * b) + log_ndtr(-a / np.sqrt(2 * b)))


def _vuong(difference: np.ndarray) -> LikelihoodRatio:
    from scipy.special import erfc

    total, spread = float(np.sum(difference)), float(np.std(difference))
    if spread < 1e-9:
        return LikelihoodRatio(z=0.0, p=1.0)
    z = total / (len(difference) ** 0.5 * spread)
    return LikelihoodRatio(z=z, p=float(erfc(abs(z) / np.sqrt(2))))

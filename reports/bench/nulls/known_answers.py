"""Known answers: does `--nulls` tell noise from structure, and does the interval of alpha hold what it promises?

    OMP_NUM_THREADS=1 python reports/bench/nulls/known_answers.py --out reports/bench/nulls/known_answers.json

Every number is a function of the seeds in this file. About five minutes on one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from htsr.numerics.bootstrap import REPLICAS, alpha_interval
from htsr.numerics.goodness import goodness_of_fit
from htsr.numerics.marchenko_pastur import edge_and_scale, fit_noise
from htsr.numerics.permutation import SHIFT, measure_entries, permutation_p
from htsr.numerics.powerlaw import fit_power_law
from htsr.numerics.thresholds import alpha_average, ks_curve

SIDE = 256
ALPHAS, SIZES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0), (50, 100, 384, 1024, 2048)
LAWS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "student t, 4": lambda rng, shape: rng.standard_t(4, shape),
    "student t, 5": lambda rng, shape: rng.standard_t(5, shape),
    "two scales": lambda rng, shape: rng.standard_normal(shape) * np.where(rng.random(shape) < 0.05, 4, 1),
    "sparse normal, 30 %": lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) < 0.3),
    "sparse normal, 5 %": lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) < 0.05),
    "sparse signs, 5 %": lambda rng, shape: np.sign(rng.standard_normal(shape)) * (rng.random(shape) < 0.05),
    "sparse signs, 2 %": lambda rng, shape: np.sign(rng.standard_normal(shape)) * (rng.random(shape) < 0.02),
    "sparse signs, 1 %": lambda rng, shape: np.sign(rng.standard_normal(shape)) * (rng.random(shape) < 0.01),
}
SPIKES = {"weak": (1.05, 1.1, 1.15), "above the edge": (1.1, 1.25, 1.5), "strong": (1.5, 2.0, 3.0)}


def pareto(samples: int) -> list[dict[str, float]]:
    """Exact power laws: estimates, the coverage of the 95 % interval, and how often goodness of fit rejects them."""
    rows = []
    for size in SIZES:
        for alpha in ALPHAS:
            rng = np.random.default_rng([1, size, round(10 * alpha)])
            found = []
            for _ in range(samples):
                x = rng.pareto(alpha - 1, size) + 1
                interval, fit = alpha_interval(x, rng), fit_power_law(x)
                sigma = abs(fit.alpha - alpha) <= 1.96 * fit.sigma
                average = alpha_average(ks_curve(x)) if size <= 384 else np.nan
                p = goodness_of_fit(x, rng) if size <= 384 else np.nan
                found.append((fit.alpha, average, interval.low <= alpha <= interval.high, sigma, p < 0.1))
            mean = np.mean(found, axis=0)
            rows.append({"size": size, "alpha": alpha, "fit": mean[0], "fit_sd": np.std([f[0] for f in found]),
                         "average": mean[1], "coverage": mean[2], "coverage_of_sigma": mean[3],
                         "gof_rejects": mean[4] if size <= 384 else np.nan})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def planted(rng: np.random.Generator, multiples: tuple[float, ...]) -> np.ndarray:
    """Gaussian noise and spikes whose eigenvalues lie at these multiples of its edge (in the limit of a large side).

    A rank-one part of squared strength u s^2 n, u > 1, puts an eigenvalue at s^2 n (1 + u)^2 / u (square matrix).
    """
    W = rng.standard_normal((SIDE, SIDE))
    for m in multiples:
        u = (2 * m - 1) + np.sqrt((2 * m - 1) ** 2 - 1)
        left, right = rng.standard_normal((2, SIDE))
        W += np.sqrt(u * SIDE) * np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
    return W


def matrices(make: Callable[[np.random.Generator], np.ndarray], count: int, seed: int) -> dict[str, Any]:
    """How often each verdict falls on `count` matrices of 256 x 256."""
    found = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        W = make(rng)
        eigenvalues = np.linalg.eigvalsh(W.T @ W)
        entries, noise = measure_entries([W], *W.shape), fit_noise(eigenvalues, *W.shape)
        by_permutation = permutation_p(W.astype(np.float32), float(eigenvalues[-1]), rng)
        by_law, bound = (f(float(eigenvalues[-1])) for f in (entries.noise_survival, entries.bound_survival))
        p_null = by_law if entries.light_tailed else by_permutation if np.isnan(bound) else bound
        alpha = fit_power_law(eigenvalues[eigenvalues > 1e-5]).alpha
        found.append({"alpha in 2..6": 2 <= alpha <= 6, "permutation < 0.05": by_permutation < 0.05,
                      "tracy-widom < 0.05": by_law < 0.05, "light tails": entries.light_tailed,
                      "p_null < 0.05": p_null < 0.05, "beyond the bound": not np.isnan(bound),
                      "p_edge < 0.05": noise.p_edge < 0.05, "spikes": noise.num_spikes})  # fmt: skip
    result = {key: int(sum(f[key] for f in found)) for key in found[0] if key != "spikes"}
    spikes = np.bincount([f["spikes"] for f in found], minlength=5)
    return {"matrices": count, **result, "spikes 0, 1, 2, 3, 4+": [*spikes[:4].tolist(), int(spikes[4:].sum())]}


def margins(count: int) -> dict[str, Any]:
    """How far noise of a law gets towards `Entries.bound_survival`: its largest eigenvalue, in Tracy-Widom parts.

    Only matrices that the bound would judge (`spread_out`); it speaks from 10 parts beyond the shift on.
    """
    result = {}
    for seed, (law, draw) in enumerate(LAWS.items()):
        rng, found = np.random.default_rng([99, seed]), []
        for rows, cols in [(64, 64), (128, 512), (256, 256)] * count:
            W = draw(rng, (rows, cols))
            entries = measure_entries([W], rows, cols)
            if entries.spread_out:
                edge, scale = edge_and_scale(rows, cols)
                parts = (np.linalg.norm(W, 2) ** 2 / (entries.variance + entries.mean**2) - edge) / scale
                shift = SHIFT * max(0.0, entries.kurtosis) / min(rows, cols) ** (1 / 3)
                found.append((parts, parts - shift, entries.kurtosis))
        highest = np.max(found, axis=0).tolist() if found else [None] * 3
        result[law] = {
            "matrices": len(found),
            **dict(zip(("parts", "beyond the shift", "kurtosis"), highest, strict=True)),
        }
        print(law, result[law], flush=True)
    return result


def seconds(work: Callable[[], Any], runs: int = 5) -> float:
    """Median CPU seconds of this thread."""
    times = []
    for _ in range(runs):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return float(np.median(times))


def costs() -> dict[str, float]:
    """CPU seconds of each part, one thread."""
    rng = np.random.default_rng(0)
    W = rng.standard_t(4, (2048, 2048))
    heavy, tail = np.linalg.eigvalsh(W.T @ W), rng.pareto(2.0, 2048) + 1
    small, wide = rng.standard_normal((SIDE, SIDE)).astype(np.float32), W[:512, :1376].astype(np.float32)
    far = 1.6 * edge_and_scale(SIDE, SIDE)[0]
    return {
        "bootstrap, spectrum of 2048": seconds(lambda: alpha_interval(heavy[heavy > 1e-5], rng)),
        "bootstrap, Pareto sample of 2048": seconds(lambda: alpha_interval(tail, rng)),
        "goodness of fit, Pareto sample of 2048": seconds(lambda: goodness_of_fit(tail, rng)),
        "all xmin, 2048": seconds(lambda: ks_curve(tail)),
        "Marchenko-Pastur fit, 2048": seconds(lambda: fit_noise(heavy, 2048, 2048)),
        "99 permutations, 256 x 256, lambda_max far out": seconds(lambda: permutation_p(small, far, rng), 3),
        "99 permutations, 512 x 1376, lambda_max of a permutation": seconds(
            lambda: permutation_p(wide, float(np.linalg.norm(wide, 2) ** 2), rng), 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=200)
    parser.add_argument("--samples", type=int, default=200, help="Pareto samples of each size and exponent")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cases: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
        "gaussian": lambda rng: rng.standard_normal((SIDE, SIDE)),
        "student t, 5 degrees": lambda rng: rng.standard_t(5, (SIDE, SIDE)),
        "student t, 3 degrees": lambda rng: rng.standard_t(3, (SIDE, SIDE)),
    }
    for name, multiples in SPIKES.items():
        cases[f"three spikes, {name} {multiples}"] = lambda rng, m=multiples: planted(rng, m)
    record: dict[str, Any] = {
        "settings": {"side": SIDE, "replicas": REPLICAS, "matrices": options.matrices, "samples": options.samples},
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "cpu_seconds": costs(),
        "matrices": {},
    }
    print(json.dumps(record["cpu_seconds"], indent=1), flush=True)
    for seed, (name, make) in enumerate(cases.items()):
        record["matrices"][name] = matrices(make, options.matrices, seed)
        print(name, record["matrices"][name], flush=True)
    record["bound"] = margins(options.matrices // 2)
    record["pareto"] = [{k: None if v != v else v for k, v in row.items()} for row in pareto(options.samples)]
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

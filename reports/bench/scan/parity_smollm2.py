"""The native scan against weightwatcher: the same numbers, CPU seconds of whole processes, peak memory.

    python reports/studies/first-road/fetch_smollm2.py DIRECTORY      (once; needs a package index)
    python reports/bench/scan/parity_smollm2.py DIRECTORY [--runs 3] [--out FILE.json]

Every measurement is a fresh process, imports included, nothing from the cache; runs of both sides alternate, with one
BLAS thread, then with all cores. OPENBLAS_* settings of the environment, which may slow down one side more than the
other, are dropped, and kept in a set of runs of their own.
Exits 1 when a number differs or a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pandas as pd

ALPHA_TOLERANCE, WANTED_RATIO, WANTED_WALL_RATIO, MIB = 1e-6, 3.5, 6.0, 2**20
SIDES = {
    "htsr": (
        "import htsr, sys; htsr.scan(sys.argv[1], calibration=None, quiet=True, fresh=True).frame.to_csv(sys.argv[2])"
    ),
    "weightwatcher": (
        "import sys, weightwatcher as ww; ww.WeightWatcher(model=sys.argv[1]).analyze().to_csv(sys.argv[2])"
    ),
}
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run([sys.executable, "-c", *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
use = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"cpu_s": use.ru_utime + use.ru_stime, "wall_s": time.perf_counter() - start,
                  "peak_bytes": use.ru_maxrss * 1024}))
"""
EQUAL = {
    "alpha": "alpha", "ks_d": "D", "xmin": "xmin", "alpha_sigma": "sigma", "alpha_hat": "alpha_weighted",
    "log10_norm": "log_norm", "log10_spectral_norm": "log_spectral_norm", "lambda_max": "lambda_max",
    "stable_rank": "stable_rank", "entropy": "entropy",
}  # fmt: skip


def run(side: str, model: Path, table: Path, *, default_blas: bool, threads: int) -> dict[str, float]:
    """CPU seconds, wall seconds and peak bytes of one fresh process."""
    environment = {k: v for k, v in os.environ.items() if not (default_blas and k.startswith("OPENBLAS_"))}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    environment["HTSR_CACHE"] = str(table.parent / "cache")
    command = [sys.executable, "-c", MEASURE, SIDES[side], str(model), str(table)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def compare(ours: Path, theirs: Path) -> dict[str, object]:
    """How far the two tables are apart, matrix by matrix."""
    left = pd.read_csv(ours).query("status == 'ok'").assign(name=lambda t: t["tensor"].str.removesuffix(".weight"))
    right = pd.read_csv(theirs).set_index("longname").add_suffix("_ww")
    both = left.set_index("name").join(right, how="outer")
    differences = {a: float((both[a] - both[f"{b}_ww"]).abs().max()) for a, b in EQUAL.items()}
    return {
        "matrices": len(both),
        "analysed_by_both": int((both["alpha"].notna() & both["alpha_ww"].notna()).sum()),
        "n_tail_differs": int((both["n_tail"] != both["num_pl_spikes_ww"]).sum()),
        "largest_difference": differences,
    }


def measure(model: Path, runs: int, *, default_blas: bool, threads: int = 1) -> dict[str, object]:
    """Medians of alternating runs of both sides, their ratio, and the parity of the last pair of tables."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        tables = {side: Path(folder) / f"{side}.csv" for side in SIDES}
        for _ in range(runs):
            for side in SIDES:
                found[side].append(run(side, model, tables[side], default_blas=default_blas, threads=threads))
        parity = compare(tables["htsr"], tables["weightwatcher"])
    medians = {
        side: {key: statistics.median(r[key] for r in measured) for key in measured[0]}
        for side, measured in found.items()
    }
    ratio = medians["weightwatcher"]["cpu_s"] / medians["htsr"]["cpu_s"]
    wall = medians["weightwatcher"]["wall_s"] / medians["htsr"]["wall_s"]
    return {"median": medians, "cpu_ratio": ratio, "wall_ratio": wall, "all_runs": found, "parity": parity}


def largest_matrix_bytes(model: Path) -> int:
    from htsr.model.open import open_source

    return max(t.num_bytes for t in open_source(model).tensors if len(t.shape) == 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sets = {"default BLAS": True}
    if any(key.startswith("OPENBLAS_") for key in os.environ):
        sets["environment's BLAS"] = False
    bound = 3 * largest_matrix_bytes(arguments.model) + 700 * MIB
    report: dict[str, object] = {
        "model": "SmolLM2-135M-Instruct, fp32 (dequantised:Q4_1)",
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "blas_threads": 1},
        "versions": {n: metadata.version(n) for n in ("htsr-owlore", "weightwatcher", "numpy", "scipy", "torch")},
        "runs": arguments.runs,
        "peak_bound_bytes": bound,
    }
    passed = True
    print(f"{'setting':20}{'side':15}{'CPU s':>8}{'wall s':>8}{'peak MiB':>10}{'ratio':>7}")
    for name, default_blas in sets.items():
        result = report[name] = measure(arguments.model, arguments.runs, default_blas=default_blas)
        for side, row in result["median"].items():
            ratio = f"{result['cpu_ratio']:7.2f}" if side == "htsr" else "      1"
            print(f"{name:20}{side:15}{row['cpu_s']:8.2f}{row['wall_s']:8.2f}{row['peak_bytes'] / MIB:10.0f}{ratio}")
        parity = result["parity"]
        same = parity["matrices"] == parity["analysed_by_both"] and not parity["n_tail_differs"]
        print(f"{'':20}{parity['analysed_by_both']} of {parity['matrices']} matrices in both; n_tail differs in "
              f"{parity['n_tail_differs']}; alpha by at most {parity['largest_difference']['alpha']:.1e}")  # fmt: skip
        passed &= same and parity["largest_difference"]["alpha"] <= ALPHA_TOLERANCE
        passed &= result["cpu_ratio"] >= WANTED_RATIO and result["median"]["htsr"]["peak_bytes"] <= bound
    print(
        f"bound on the peak: {bound / MIB:.0f} MiB (3 x the largest matrix + 700); {'passed' if passed else 'FAILED'}"
    )
    both = report["all cores"] = measure(
        arguments.model, arguments.runs, default_blas=True, threads=os.cpu_count() or 1
    )
    a, b = (both["median"][side]["wall_s"] for side in ("weightwatcher", "htsr"))
    print(f"all cores: wall {b:.2f} s against {a:.2f}, {a / b:.2f} times (wanted: {WANTED_WALL_RATIO:g})")
    if arguments.out:
        arguments.out.write_text(json.dumps({**report, "passed": bool(passed)}, indent=1) + "\n")
    return 0 if passed else 1


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())


if __name__ == "__main__":
    sys.exit(main())

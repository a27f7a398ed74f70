"""Large matrices: the native scan against weightwatcher on the same weights in one process, one thread, CPU seconds.

    env -u OPENBLAS_CORETYPE OMP_NUM_THREADS=1 python reports/bench/scan/large.py [--runs 3] [--out FILE.json]
    python reports/bench/scan/large.py --case 4096x4096   (only matrices with that in their name; FILE keeps the others)
    python reports/bench/scan/large.py --parity 12        (only correctness, on that many matrices of 2048 x 2048)
    python reports/bench/scan/large.py --disk             (only a tensor of 8192 x 28672, bf16, scanned from disk)
    python reports/bench/scan/large.py --device cuda      (spectra on a GPU; wall seconds of synchronised calls)
    python reports/bench/scan/large.py --against FILE     (weightwatcher's seconds and rows from an earlier run's FILE)

Rows of Gaussian numbers have Pareto lengths, so that tails are as heavy as those of trained layers. Two are harder:
"long tail" ends in float64 (escalated), "singular" has two equal columns. Before anything is timed n_tail must be equal
and alpha within 1e-6 of weightwatcher's. The floor is the flops of one triangle of the Gram matrix and of the reduction
to tridiagonal form, over the measured rate of a float32 product.

With --against nothing of weightwatcher runs: its seconds are those of FILE and of FILE's machine, and its row is the
one of ours in FILE, which was checked against it there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
SLOWED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # settings that choose other kernels than the CPU's own
LIBRARIES = ("htsr-owlore", "weightwatcher", "numpy", "scipy", "torch")
ALPHA_TOLERANCE, MIB = 1e-6, 2**20
CASES = [  # (name, rows, cols, Pareto index of the row lengths, dtype, wanted ratio)
    ("2048x2048 fp32", 2048, 2048, 3.0, "float32", 6.0),
    ("2048x2048 bf16", 2048, 2048, 3.0, "bfloat16", None),
    ("4096x4096 fp32", 4096, 4096, 3.0, "float32", 7.0),
    ("4096x4096 bf16", 4096, 4096, 3.0, "bfloat16", None),
    ("11008x4096 fp32", 11008, 4096, 5.0, "float32", 9.0),
    ("11008x4096 bf16", 11008, 4096, 5.0, "bfloat16", None),
    ("2048x2048 fp32, long tail", 2048, 2048, 1.2, "float32", 3.0),
    ("2048x2048 fp32, singular", 2048, 2048, 4.0, "float32", 3.0),
]


def matrix(rows: int, cols: int, index: float, dtype: str, seed: int = 0, *, singular: bool = False) -> Any:
    import torch

    rng = torch.Generator().manual_seed(seed)
    lengths = torch.rand(rows, 1, generator=rng) ** (-1 / index)  # Pareto from 1
    W = 0.02 * torch.randn(rows, cols, generator=rng) * lengths
    if singular:
        W[:, 1] = W[:, 0]
    return W.to(getattr(torch, dtype))


def native(W: Any, device: str) -> dict[str, Any]:
    """The row of a scan, with how its spectrum was found."""
    from htsr.matrix_row import analyse
    from htsr.model.layers import views
    from htsr.model.open import open_source

    source = open_source({"layers.0.w.weight": W})
    options = {} if device == "cpu" else {"device": device}
    row, values = analyse(source, views(source)[0], "auto", **options)
    assert values is not None, row["reason"]
    above = values[values > 1e-5]
    return {**row, "gap": gap(above)}


def gap(x: np.ndarray) -> float:
    """How much worse the second-best candidate is, in KS distance (not timed: 0.0 when asked not to)."""
    if not MEASURE_GAP:
        return 0.0
    from htsr.numerics.powerlaw import candidate

    log_x = np.log(x)
    best = np.sort([candidate(x, log_x, i)[1] for i in range(len(x) - 1)])
    return float(best[1] - best[0])


MEASURE_GAP = False


def reference(W: Any) -> dict[str, Any]:
    """weightwatcher's row for the same values (it reads no bfloat16: such values are handed over as float32)."""
    import torch

    with contextlib.redirect_stdout(io.StringIO()):
        import weightwatcher as ww

    layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight.data = W.float()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        details = ww.WeightWatcher(model=torch.nn.Sequential(layer)).analyze()
        logging.disable(logging.NOTSET)
    return details.iloc[0].to_dict()


def check(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The difference of alpha; AssertionError when the two rows differ."""
    difference = abs(ours["alpha"] - theirs["alpha"])
    assert ours["n_tail"] == theirs["num_pl_spikes"], (ours["n_tail"], theirs["num_pl_spikes"])
    assert difference <= ALPHA_TOLERANCE, difference
    if "entropy" in theirs:
        assert abs(ours["entropy"] - theirs["entropy"]) <= 1e-5, (ours["entropy"], theirs["entropy"])
    return float(difference)


def seconds(work: Any, runs: int, clock: Any) -> list[float]:
    found = []
    for _ in range(runs):
        start = clock()
        work()
        found.append(clock() - start)
    return found


def gemm_rate() -> float:
    """flop/s of a float32 matrix product on one thread."""
    A = np.random.default_rng(0).standard_normal((2048, 2048), dtype=np.float32)
    return 2 * 2048**3 / min(seconds(lambda: A @ A.T[::1].copy(), 5, time.process_time))


def earlier(file: Path) -> dict[str, dict[str, Any]]:
    """By matrix what `bench` needs in place of weightwatcher: its seconds, and the row that was found equal to its.

    Files written before the entropy was kept have none; then it is not compared.
    """
    report = json.loads(file.read_text())
    made = {"file": file.name, "machine": report["machine"], "versions": report["versions"]}
    return {
        row["matrix"]: {
            "seconds": row["weightwatcher_s"],
            "row": {"num_pl_spikes": row["n_tail"]} | {k: row[k] for k in ("alpha", "entropy") if k in row},
            "from": row.get("weightwatcher_from", made),
        }
        for row in report["cases"]
    }


def bench(runs: int, device: str, case: str, against: Path | None) -> tuple[list[dict[str, Any]], float]:
    """One row a case; weightwatcher always on the CPU, or from an earlier run's file."""
    known = earlier(against) if against else {}
    rate = gemm_rate()
    rows = []
    clock = time.process_time if device == "cpu" else time.perf_counter
    widths = {"route": 11, "tail": 6, "refined": 8, "ww s": 8, "htsr s": 8, "ratio": 7, "floor s": 9, "x": 6}
    if known:
        machines = {json.dumps(found["from"]["machine"], sort_keys=True) for found in known.values()}
        print(f"ww s, and with it the ratio, are of an earlier run on {' or '.join(sorted(machines))}")
    print(f"{'matrix':28}" + "".join(f"{word:>{width}}" for word, width in widths.items()))
    for name, m, n, index, dtype, wanted in CASES:
        if case not in name:
            continue
        if against and name not in known:
            print(f"{name:28}  left out: {against.name} does not have it", flush=True)
            continue
        W = matrix(m, n, index, dtype, singular=name.endswith("singular"))
        ours, theirs = native(W, device), known[name]["row"] if known else reference(W)
        difference = check(ours, theirs)
        slow, fast = list(known[name]["seconds"]) if known else [], []
        for _ in range(runs):  # alternating
            if not known:
                slow += seconds(lambda W=W: reference(W), 1, time.process_time)
            fast += seconds(lambda W=W: native(W, device), 1 if device == "cpu" else 3, clock)
        a, b = statistics.median(slow), statistics.median(fast)
        floor = (n * n * m + 4 / 3 * n**3) / rate
        rows.append(
            {
                "matrix": name, "route": ours["route"], "why": ours["why"], "n_tail": ours["n_tail"],
                "alpha": ours["alpha"], "alpha_difference": difference, "entropy": ours["entropy"],
                "entropy_compared": "entropy" in theirs, "refined": ours["refined"],
                "weightwatcher_s": slow, "htsr_s": fast, "ratio": a / b, "wanted": wanted, "floor_s": floor,
                "times_floor": b / floor, "gflop": ours["flops"] / 1e9,
                **({"weightwatcher_from": known[name]["from"]} if known else {}),
            }
        )  # fmt: skip
        print(
            f"{name:28}{ours['route']:>11}{ours['n_tail']:6}{ours['refined']:8}{a:8.2f}{b:8.2f}{a / b:7.2f}{floor:9.2f}"
            f"{b / floor:6.1f}", flush=True,
        )  # fmt: skip
    return rows, rate / 1e9


def parity(count: int) -> list[dict[str, Any]]:
    """Matrices of 2048 x 2048 against float64 singular values through the same fit; gaps of the best two candidates."""
    from htsr.numerics.powerlaw import fit_power_law

    global MEASURE_GAP
    MEASURE_GAP = True
    rows = []
    for seed in range(count):
        W = matrix(2048, 2048, (2.0, 2.5, 3.0, 4.0, 6.0)[seed % 5], ("float32", "bfloat16")[seed % 2], seed)
        ours = native(W, "cpu")
        sigma = np.linalg.svd(W.double().numpy(), compute_uv=False)
        truth = np.sort(sigma**2)
        fit = fit_power_law(truth[truth > 1e-5])
        assert ours["n_tail"] == fit.n_tail, (seed, ours["n_tail"], fit.n_tail)
        assert abs(ours["alpha"] - fit.alpha) <= ALPHA_TOLERANCE
        rows.append({k: ours[k] for k in ("route", "why", "n_tail", "refined", "alpha", "gap")})
        rows[-1]["alpha_difference"] = abs(ours["alpha"] - fit.alpha)
        print(rows[-1], flush=True)
    MEASURE_GAP = False
    return rows


DISK = """
import json, sys, time, htsr
start = time.process_time()
result = htsr.scan(sys.argv[1], calibration=None, quiet=True, fresh=True, workers=1)
row = result.frame.iloc[0]
print(json.dumps({"cpu_s": time.process_time() - start, "seconds": result.provenance["seconds"],
                  "peak_bytes": result.provenance["peak_bytes"], "alpha": row.alpha, "n_tail": int(row.n_tail),
                  "spectra": result.provenance["spectra"]}))
"""


def disk(rows: int = 8192, cols: int = 28672) -> dict[str, Any]:
    """A bf16 tensor written to a temporary directory, scanned by a fresh process: its seconds and its peak."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        header = {"layers.0.w.weight": {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [0, 2 * rows * cols]}}
        encoded = json.dumps(header).encode()
        rng = torch.Generator().manual_seed(0)
        lengths = 0.02 * torch.rand(1, cols, generator=rng) ** (-1 / 5)
        with file.open("wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            for _ in range(0, rows, 256):
                part = (torch.randn(256, cols, generator=rng) * lengths).bfloat16()
                out.write(part.view(torch.uint8).numpy().tobytes())
        environment = {k: v for k, v in os.environ.items() if k not in SLOWED} | SINGLE | {"HTSR_CACHE": folder}
        done = subprocess.run(
            [sys.executable, "-c", DISK, str(file)], env=environment, check=True, capture_output=True, text=True
        )
    found = json.loads(done.stdout)
    print(f"{rows}x{cols} bf16 from disk: {found['cpu_s']:.1f} CPU s, peak {found['peak_bytes'] / MIB:.0f} MiB")
    assert found["peak_bytes"] < 1.5 * 1024 * MIB
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--parity", type=int, metavar="N")
    parser.add_argument("--disk", action="store_true")
    parser.add_argument("--case", default="", metavar="TEXT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--against", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if any(os.environ.get(k) != v for k, v in SINGLE.items()) or any(k in os.environ for k in SLOWED):
        environment = {k: v for k, v in os.environ.items() if k not in SLOWED} | SINGLE
        return subprocess.run([sys.executable, *sys.argv], env=environment).returncode
    report: dict[str, Any] = {}
    if arguments.out and arguments.out.exists():
        report = json.loads(arguments.out.read_text())
    report |= {
        "machine": {"cpu": cpu_name(), "threads": 1, "device": device_name(arguments.device)},
        "versions": {n: metadata.version(n) for n in LIBRARIES if not (arguments.against and n == "weightwatcher")},
    }
    if arguments.parity is not None:
        report["parity_2048"] = parity(arguments.parity)
    elif arguments.disk:
        report["disk_8192x28672_bf16"] = disk()
    else:
        rows, report["gemm_gflops"] = bench(arguments.runs, arguments.device, arguments.case, arguments.against)
        kept = {row["matrix"]: row for row in [*report.get("cases", []), *rows]}
        report["cases"] = [kept[name] for name, *_ in CASES if name in kept]
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a CUDA device does in a second: products, eigenvalues, bases, formats, the bus. Prints JSON.

python reports/bench/gpu/rates.py [> FILE.json]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from owlore.kernels import nf4
from owlore.kernels.projector import find_basis
from owlore.residency.formats import FORMATS
from owlore.residency.pinned import pin

CUDA = torch.device("cuda")
COPY_BYTES = 1 << 31


def seconds(work: Callable[[], object], times: int = 5) -> float:
    """Of one call, after one that is not counted."""
    work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def products() -> dict[str, float]:
    found = {}
    for name, dtype, side in (
        ("bf16", torch.bfloat16, 8192),
        ("fp32", torch.float32, 4096),
        ("fp64", torch.float64, 4096),
    ):
        A = torch.randn(side, side, device=CUDA).to(dtype)
        found[f"{name}_mm_tflops"] = 2 * side**3 / seconds(lambda A=A: A @ A) / 1e12
    return found


def decompositions() -> dict[str, float]:
    found = {}
    for side in (1024, 2048, 4096):
        A = torch.randn(side, side, device=CUDA)
        for name, G in (("f32", A @ A.T), ("f64", (A @ A.T).double())):
            found[f"eigvalsh_{side}_{name}"] = seconds(lambda G=G: torch.linalg.eigvalsh(G), 1)
            found[f"eigh_{side}_{name}"] = seconds(lambda G=G: torch.linalg.eigh(G), 1)
    for rows in (4096, 11008):
        Y = torch.randn(rows, 160, device=CUDA)
        found[f"qr_{rows}"] = seconds(lambda Y=Y: torch.linalg.qr(Y))
        found[f"cholqr64_{rows}"] = seconds(lambda Y=Y: cholesky_qr(Y.double()))
    return found


def cholesky_qr(Y: Tensor) -> Tensor:
    factor, _ = torch.linalg.cholesky_ex(Y.T @ Y)
    return torch.linalg.solve_triangular(factor, Y.T, upper=False).T


def ours() -> dict[str, float]:
    found = {}
    for rows in (4096, 11008):
        G = torch.randn(rows, 4096, device=CUDA, dtype=torch.bfloat16)
        stream = torch.Generator(CUDA).manual_seed(0)
        found[f"find_basis_{rows}"] = seconds(lambda G=G, s=stream: find_basis(G, 128, generator=s), 3)
    W = torch.randn(11008, 4096, device=CUDA, dtype=torch.bfloat16)
    for name in ("int8", "nf4"):
        form = FORMATS[name]
        held = form.pack(W)
        found[f"pack_{name}"] = seconds(lambda f=form: f.pack(W))
        found[f"dense_{name}"] = seconds(lambda f=form, h=held: f.dense(h, tuple(W.shape), W.dtype))
    plain = nf4.Nf4(shape=tuple(W.shape), block=64, **FORMATS["nf4"].pack(W))
    found["dense_nf4_plain"] = seconds(lambda: nf4.dequantise(plain, W.dtype))
    return found


def bus() -> dict[str, float]:
    started = time.perf_counter()
    host = pin(COPY_BYTES)
    found = {"pin_2GiB_s": time.perf_counter() - started, "pinned": host.pinned}
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=CUDA)
    found["h2d_GBs"] = COPY_BYTES / seconds(lambda: there.copy_(host.tensor, non_blocking=True), 3) / 1e9
    found["d2h_GBs"] = COPY_BYTES / seconds(lambda: host.tensor.copy_(there, non_blocking=True), 3) / 1e9
    return found


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: there is nothing to measure")
    print(json.dumps({**products(), **decompositions(), **ours(), **bus()}, indent=1))

"""Gram matrices of bfloat16 weights on the matrix units of a CPU: exact products, float32 sums.

torch's float32 product at precision "medium" rounds both operands to bfloat16. That is exact where they are bfloat16
values, and wrong anywhere else, so it is used for no other slice. The precision is a global setting: it is changed for
the one product and put back whatever happens.

It pays where the CPU has bfloat16 matrix units (AMX): 2.8 times a float32 product and 3 of a triangle's. Where it only
has bfloat16 vector instructions, BLAS's float32 triangle is 1.8 times as fast (2048 x 2048, AMD Zen 5), and stays.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from htsr.numerics.spectrum import as_array, gram

LOWER_HALF = np.uint32(0xFFFF)  # of a float32: zero in a bfloat16 value
_LOCK = threading.Lock()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The words of /proc/cpuinfo, among them the CPU's instruction sets; empty on other systems than Linux."""
    info = Path("/proc/cpuinfo")
    return frozenset(info.read_text(errors="replace").split() if info.exists() else ())


def has_matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (Intel AMX)."""
    return "amx_bf16" in cpu_flags()


def holds_bf16(block: np.ndarray) -> bool:
    """Whether every value of a float32 array is a bfloat16 value."""
    flat = np.ascontiguousarray(block).view(np.uint32)
    return not bool(np.any(flat & LOWER_HALF))


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Compute torch's float32 products at `precision` while the context is open; one thread at a time has it open.

    Args:
        precision: "medium" (bfloat16), "high" (TF32) or "highest", as `torch.set_float32_matmul_precision` takes it.
    """
    import torch

    with _LOCK:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def medium_gram(slices: Iterable[Any], side: int) -> np.ndarray:
    """sum_b S_b^T S_b in float32, shape (side, side), Fortran order; slices that hold other values are left to BLAS."""
    import torch

    G: np.ndarray = np.zeros((side, side), np.float32, order="F")
    for block in slices:
        S = as_array(block, np.float32)
        if holds_bf16(S):
            tensor = torch.from_numpy(np.ascontiguousarray(S))
            with matmul_precision("medium"):
                product = (tensor.T @ tensor).numpy()
        else:
            product = gram([S], side, np.float32)
        G += product
    return G

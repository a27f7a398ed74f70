"""The costly steps of a spectrum in torch, for a GPU. The same code runs on CPU tensors, where the tests run it.

Slices go to the device one at a time, in the dtype that they have, so a matrix that lies elsewhere is never all there:
memory is that of the Gram matrix, its eigenvectors and a slice. Where the device multiplies float64 at the full rate
(`exact_side`) the Gram matrix and its eigenvalues are float64's at once: on an H100 eigvalsh took 0.026 s in float64 at
a side of 2048 and 0.119 at 4096, eigh in float32 0.026 and 0.096. Elsewhere the certified route is taken, whose TF32
products (10 bits of mantissa, summed in float32) are exact for bfloat16 and float16 values and used for nothing else;
torch's global precision is put back after each.

Both routes give the CPU's fit on an H100 (`pytest -m gpu`); how fast a whole scan is there was not measured.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from htsr.errors import BadInput
from htsr.numerics.backend import Backend
from htsr.numerics.bf16 import matmul_precision
from htsr.numerics.certified import EXACT_SIDE
from htsr.numerics.fullrank import has_full_rank
from htsr.numerics.spectrum import require_finite, without_noise

BEYOND_TF32 = 0x1FFF  # the bits of a float32 that TF32 drops
FULL_RATE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # compute capabilities; of the others 1/32 and less is float64's
SHARE, MATRICES = 1 / 3, 3  # of the free memory for float64: the Gram matrix, the solver's copy and its work space
_LOCK = threading.Lock()
_READY: set[str] = set()


def holds_tf32(S: Tensor) -> bool:
    """Whether every value of a float32 tensor is a TF32 value, as all bfloat16 and normal float16 values are."""
    return not bool((S.view(torch.int32) & BEYOND_TF32).any())


def exact_side(device: str) -> int | None:
    """The largest side for which float64 throughout is fast and fits, None where float64 is slow (or on the CPU)."""
    if torch.device(device).type != "cuda" or torch.cuda.get_device_capability(device) not in FULL_RATE:
        return None
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return largest_exact(torch.cuda.mem_get_info(device)[0] + reusable)


def largest_exact(free: int) -> int:
    """The side whose MATRICES float64 matrices take SHARE of `free` bytes, at least what is exact everywhere."""
    return max(math.isqrt(int(free * SHARE) // (MATRICES * 8)), EXACT_SIDE)


def to_device(block: Any, dtype: torch.dtype, device: str) -> Tensor:
    """Copy a slice to the device in `dtype`; a narrower dtype is copied as it is and widened on the device."""
    S = block.detach() if isinstance(block, Tensor) else torch.from_numpy(np.require(block, requirements="W"))
    if S.dtype.itemsize > dtype.itemsize:
        S = S.to(dtype)
    return S.to(device).to(dtype)


def prepare(device: str) -> None:
    """Load what torch loads with the first decomposition on a GPU, which several threads must not do at once."""
    with _LOCK:
        if torch.device(device).type == "cuda" and device not in _READY:
            torch.linalg.eigvalsh(torch.eye(2, device=device))
            _READY.add(device)


@dataclass(frozen=True)
class Decomposed:
    """Eigenvalues (float64, on the CPU) and eigenvectors (on the device) of a float32 Gram matrix."""

    values: np.ndarray
    basis: Tensor

    def vectors(self, indices: np.ndarray) -> Tensor:
        """Eigenvectors of the values at `indices`, as columns."""
        return self.basis[:, torch.as_tensor(indices, device=self.basis.device)]

    def solve(self, R: np.ndarray, shift: float) -> np.ndarray:
        """(G + shift)^-1 R to float32's accuracy, float64; `shift` makes G positive definite."""
        size = np.maximum(np.linalg.norm(R, axis=0), np.finfo(np.float64).tiny)
        right = torch.from_numpy(np.asarray(R / size, np.float32)).to(self.basis.device)
        spread = torch.from_numpy(1 / (self.values + shift)).to(self.basis.device)[:, None]
        X = (self.basis.T @ right).double() * spread
        largest = float(X.abs().max()) or 1.0
        return (self.basis @ (X / largest).float()).double().cpu().numpy() * (size * largest)


def torch_backend(device: str, exact_up_to: int | None = None) -> Backend:
    """Make the steps of `certified.spectrum` on a torch device.

    Args:
        device: "cpu" or "cuda[:N]"; on a CUDA device each thread has a stream of its own.
        exact_up_to: the backend's `exact_side`; None measures what the device is good for.
    """
    prepare(device)

    def on_device(slices: Iterable[Any], dtype: torch.dtype) -> Iterator[Tensor]:
        return (to_device(block, dtype, device) for block in slices)

    def reduce(slices: Iterable[Any], side: int, scale: float) -> Decomposed:
        with thread_stream(device):
            G = torch.zeros(side, side, device=device)
            for S in on_device(slices, torch.float32):
                scaled = S * scale  # a power of two
                with matmul_precision("high" if holds_tf32(S) else "highest"):
                    G += scaled.T @ scaled
            if not bool(torch.isfinite(G).all()):
                raise BadInput("got a matrix that leaves the range of float32, expected one of moderate size")
            values, basis = torch.linalg.eigh(G)
            return Decomposed(values.double().cpu().numpy(), basis)

    def residuals(slices: Iterable[Any], V: Tensor, values: np.ndarray) -> np.ndarray:
        with thread_stream(device):
            Q = V.double()
            AQ = torch.zeros_like(Q)
            for S in on_device(slices, torch.float64):
                AQ += S.T @ (S @ Q)
            off = AQ - Q * torch.from_numpy(np.asarray(values)).to(device)
            return (off.norm(dim=0) / Q.norm(dim=0)).cpu().numpy()

    def ritz(slices: Iterable[Any], V: Tensor) -> np.ndarray:
        with thread_stream(device):
            Q = torch.linalg.qr(V.double())[0]
            K = torch.zeros(Q.shape[1], Q.shape[1], dtype=torch.float64, device=device)
            for S in on_device(slices, torch.float64):
                Y = S @ Q
                K += Y.T @ Y
            return torch.linalg.eigvalsh(K).cpu().numpy()

    def exact(slices: Iterable[Any], side: int) -> tuple[np.ndarray, None]:
        with thread_stream(device):
            G = torch.zeros(side, side, dtype=torch.float64, device=device)
            for S in on_device(slices, torch.float64):
                G.addmm_(S.T, S)
            require_finite(G)
            return without_noise(torch.linalg.eigvalsh(G).cpu().numpy(), np.float64), None

    return Backend(
        reduce=reduce,
        residuals=residuals,
        ritz=ritz,
        full_rank=has_full_rank,
        exact=exact,
        exact_side=exact_side(device) if exact_up_to is None else exact_up_to,
    )


_STREAMS = threading.local()


@contextlib.contextmanager
def thread_stream(device: str) -> Iterator[None]:
    """This thread's stream of a CUDA device, so that several small matrices overlap; nothing elsewhere."""
    if torch.device(device).type != "cuda":
        yield
        return
    known = _STREAMS.__dict__.setdefault("by_device", {})
    if device not in known:
        known[device] = torch.cuda.Stream(device)
    known[device].wait_stream(torch.cuda.current_stream(device))  # which may still be writing a resident matrix
    with torch.cuda.stream(known[device]):
        yield
        known[device].synchronize()

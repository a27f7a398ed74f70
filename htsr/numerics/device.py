"""The costly steps of a spectrum in torch, for a GPU. The same code runs on CPU tensors, where the tests run it.

Slices go to the device one at a time, so a matrix is never all there: memory is that of the Gram matrix, its
eigenvectors and a slice. TF32 products (10 bits of mantissa) are exact for bfloat16 and float16 values and used for
nothing else; torch's global precision is put back after each. Not measured on a GPU yet.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from htsr.errors import BadInput
from htsr.numerics.backend import Backend
from htsr.numerics.fullrank import has_full_rank
from htsr.numerics.spectrum import as_array, without_noise

BEYOND_TF32 = np.uint32(0x1FFF)  # the bits of a float32 that TF32 drops
_LOCK = threading.Lock()


def holds_tf32(block: np.ndarray) -> bool:
    """Whether every value of a float32 array is a TF32 value, as all bfloat16 and normal float16 values are."""
    return not bool(np.any(np.ascontiguousarray(block).view(np.uint32) & BEYOND_TF32))


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """torch's float32 products at this precision ("high": TF32, "highest") inside, and as they were outside."""
    with _LOCK:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


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


def torch_backend(device: str) -> Backend:
    """The steps of `certified.spectrum` on a torch device; on a CUDA device each thread has a stream of its own."""

    def slices_as(slices: Iterable[Any], dtype: type) -> Iterator[tuple[Tensor, np.ndarray]]:
        for block in slices:
            S = np.ascontiguousarray(as_array(block, dtype))
            yield torch.from_numpy(S).to(device), S

    def reduce(slices: Iterable[Any], side: int, scale: float) -> Decomposed:
        with own_stream(device):
            G = torch.zeros(side, side, device=device)
            for S, on_host in slices_as(slices, np.float32):
                scaled = S * scale  # a power of two
                with products("high" if holds_tf32(on_host) else "highest"):
                    G += scaled.T @ scaled
            if not bool(torch.isfinite(G).all()):
                raise BadInput("got a matrix that leaves the range of float32, expected one of moderate size")
            values, basis = torch.linalg.eigh(G)
            return Decomposed(values.double().cpu().numpy(), basis)

    def residuals(slices: Iterable[Any], V: Tensor, values: np.ndarray) -> np.ndarray:
        with own_stream(device):
            Q = V.double()
            AQ = torch.zeros_like(Q)
            for S, _ in slices_as(slices, np.float64):
                AQ += S.T @ (S @ Q)
            off = AQ - Q * torch.from_numpy(np.asarray(values)).to(device)
            return (off.norm(dim=0) / Q.norm(dim=0)).cpu().numpy()

    def ritz(slices: Iterable[Any], V: Tensor) -> np.ndarray:
        with own_stream(device):
            Q = torch.linalg.qr(V.double())[0]
            K = torch.zeros(Q.shape[1], Q.shape[1], dtype=torch.float64, device=device)
            for S, _ in slices_as(slices, np.float64):
                Y = S @ Q
                K += Y.T @ Y
            return torch.linalg.eigvalsh(K).cpu().numpy()

    def exact(slices: Iterable[Any], side: int) -> tuple[np.ndarray, None]:
        with own_stream(device):
            G = torch.zeros(side, side, dtype=torch.float64, device=device)
            for S, _ in slices_as(slices, np.float64):
                G += S.T @ S
            if not bool(torch.isfinite(G).all()):
                raise BadInput("got a matrix with NaN or infinite entries, expected finite numbers; it has no spectrum")
            return without_noise(torch.linalg.eigvalsh(G).cpu().numpy(), np.float64), None

    return Backend(
        reduce=reduce,
        residuals=residuals,
        ritz=ritz,
        full_rank=lambda A, dtype: has_full_rank(as_array(A, dtype), dtype),
        exact=exact,
    )


_STREAMS = threading.local()


@contextlib.contextmanager
def own_stream(device: str) -> Iterator[None]:
    """This thread's stream of a CUDA device, so that several small matrices overlap; nothing elsewhere."""
    if torch.device(device).type != "cuda":
        yield
        return
    known = _STREAMS.__dict__.setdefault("by_device", {})
    if device not in known:
        known[device] = torch.cuda.Stream(device)
    with torch.cuda.stream(known[device]):
        yield
        known[device].synchronize()

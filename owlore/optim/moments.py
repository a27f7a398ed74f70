"""Adam's two moments of one parameter, in fp32 or in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from owlore.kernels.quantised_state import Quantised, dequantise, quantise, quantised_bytes

BITS = (32, 8)


def moment_bytes(count: int, bits: int) -> int:
    """Bytes of both moments of `count` values, by formula."""
    return 8 * count if bits == 32 else 2 * quantised_bytes(count)


class Moments:
    """Read, change, write back. In 8 bits only what is read is fp32, for as long as the caller holds it.

    The second moment is stored as its root: what the update divides by is then as fine as the first moment, and the
    table's seven decades become fourteen of the moment itself.
    """

    def __init__(self, shape: tuple[int, ...], *, bits: int, device: torch.device) -> None:
        if bits not in BITS:
            raise ValueError(f"optimizer state of {bits} bits, expected one of {', '.join(map(str, BITS))}")
        self.bits, self.shape = bits, shape
        zeros = torch.zeros(shape, dtype=torch.float32, device=device)
        self._mean: Tensor | Quantised
        self._square: Tensor | Quantised
        self.write(zeros, torch.zeros_like(zeros))

    def read(self) -> tuple[Tensor, Tensor]:
        """(mean, square), fp32; in 32 bits they are the state itself."""
        if isinstance(self._mean, Tensor) and isinstance(self._square, Tensor):
            return self._mean, self._square
        assert isinstance(self._mean, Quantised) and isinstance(self._square, Quantised)
        return dequantise(self._mean), dequantise(self._square).square_()

    def write(self, mean: Tensor, square: Tensor) -> None:
        """Make these the state."""
        if self.bits == 32:
            self._mean, self._square = mean, square
        else:
            self._mean = quantise(mean, signed=True)
            self._square = quantise(square.sqrt(), signed=False)

    def tensors(self) -> dict[str, Tensor]:
        """The state as it is stored, by name."""
        if isinstance(self._mean, Tensor) and isinstance(self._square, Tensor):
            return {"mean": self._mean, "square": self._square}
        assert isinstance(self._mean, Quantised) and isinstance(self._square, Quantised)
        return {
            "mean": self._mean.codes,
            "mean_scales": self._mean.scales,
            "square": self._square.codes,
            "square_scales": self._square.scales,
        }

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take over stored state, bit for bit."""
        if self.bits == 32:
            self._mean, self._square = tensors["mean"].to(device), tensors["square"].to(device)
            return
        assert isinstance(self._mean, Quantised)
        shape = self._mean.shape
        self._mean = Quantised(tensors["mean"].to(device), tensors["mean_scales"].to(device), shape, True)
        self._square = Quantised(tensors["square"].to(device), tensors["square_scales"].to(device), shape, False)

    def num_bytes(self) -> int:
        """Bytes held, counted."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

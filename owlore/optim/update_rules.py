"""How a gradient becomes a change of its parameter, and the state that this takes: AdamW's two moments.

Another rule is another class of this protocol and a line in `UPDATE_RULES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from owlore.choices import STATE_BITS
from owlore.kernels.adamw import AdamW, adamw_update_
from owlore.kernels.projector import rotate_moments
from owlore.kernels.quantised_state import Quantised, dequantise, quantise, quantised_bytes


class UpdateRule(Protocol):
    """State of one parameter, in the space in which its gradient is accumulated, and the update made with it.

    Args:
        shape: shape of the gradients.
        bits: bits of each value of the state.
        device: where the state is kept.
    """

    def __init__(self, shape: tuple[int, ...], *, bits: int, device: torch.device) -> None: ...

    @staticmethod
    def planned_bytes(count: int, bits: int) -> int:
        """Bytes of the state, by formula.

        Args:
            count: values of a gradient.
            bits: bits of each value of the state.
        """

    def update(self, gradient: Tensor, step: int, constants: AdamW) -> Tensor:
        """Update the state from a gradient.

        Args:
            gradient: fp32, of the state's shape; the result may use its memory.
            step: number of the update, from 1.
            constants: AdamW's constants.

        Returns:
            The direction of the update; it is multiplied by the learning rate and subtracted. Weight decay is applied
            elsewhere.
        """

    def rotate(self, old: Tensor, new: Tensor, right: bool) -> None:
        """Express the state in a new projection basis.

        Args:
            old: the basis that the state is in, of shape (side, rank).
            new: the new basis, of the same shape.
            right: whether the columns of the matrix are projected instead of the rows.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, as a checkpoint stores it."""

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Restore what `tensors` returned, bit for bit.

        Args:
            tensors: the state by name; other names are ignored.
            device: where the state is kept.
        """


class AdamWMoments:
    """AdamW's first and second moment, in fp32 or in 8 bits.

    In 8 bits the second moment is stored as its root: what the update divides by is then as fine as the first moment,
    and the seven decades of the code table become fourteen of the moment itself.

    Args:
        shape: shape of the gradients.
        bits: 32 or 8, of each moment.
        device: where the moments are kept.

    Raises:
        ValueError: `bits` is another number.
    """

    def __init__(self, shape: tuple[int, ...], *, bits: int, device: torch.device) -> None:
        if bits not in STATE_BITS:
            raise ValueError(f"optimizer state of {bits} bits, expected one of {', '.join(map(str, STATE_BITS))}")
        self.bits, self.shape = bits, shape
        zeros = torch.zeros(shape, dtype=torch.float32, device=device)
        self._mean: Tensor | Quantised
        self._square: Tensor | Quantised
        self.write(zeros, torch.zeros_like(zeros))

    @staticmethod
    def planned_bytes(count: int, bits: int) -> int:
        """Bytes of both moments of `count` values, by formula."""
        return 8 * count if bits == 32 else 2 * quantised_bytes(count)

    def update(self, gradient: Tensor, step: int, constants: AdamW) -> Tensor:
        """Update the moments and return m_hat / (sqrt(v_hat) + eps), in the memory of `gradient`."""
        mean, square = self.read()
        direction = adamw_update_(gradient, mean, square, step, constants)
        self.write(mean, square)
        return direction

    def rotate(self, old: Tensor, new: Tensor, right: bool) -> None:
        """Express the moments in a new projection basis (`owlore.kernels.projector.rotate_moments`)."""
        self.write(*rotate_moments(*self.read(), old, new, right))

    def read(self) -> tuple[Tensor, Tensor]:
        """Return (mean, square) in fp32; in 32 bits they are the state itself."""
        if isinstance(self._mean, Tensor) and isinstance(self._square, Tensor):
            return self._mean, self._square
        assert isinstance(self._mean, Quantised) and isinstance(self._square, Quantised)
        return dequantise(self._mean), dequantise(self._square).square_()

    def write(self, mean: Tensor, square: Tensor) -> None:
        """Make these fp32 moments the state."""
        if self.bits == 32:
            self._mean, self._square = mean, square
        else:
            self._mean = quantise(mean, signed=True)
            self._square = quantise(square.sqrt(), signed=False)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, as a checkpoint stores it."""
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
        """Restore what `tensors` returned, bit for bit."""
        if self.bits == 32:
            self._mean, self._square = tensors["mean"].to(device), tensors["square"].to(device)
            return
        assert isinstance(self._mean, Quantised)
        shape = self._mean.shape
        self._mean = Quantised(tensors["mean"].to(device), tensors["mean_scales"].to(device), shape, True)
        self._square = Quantised(tensors["square"].to(device), tensors["square_scales"].to(device), shape, False)


UPDATE_RULES: dict[str, type[UpdateRule]] = {"adamw": AdamWMoments}

"""Everything that one active parameter holds: master, moments, basis and the gradient gathered so far.

A gradient enters through `receive` micro-batch by micro-batch and is projected at once, so accumulation, norm and
clipping all happen in the projected space. Only when a new basis is due does the sum of full gradients live until the
last micro-batch, because the basis has to see the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn

from owlore.kernels.adamw import AdamW, direction, update_moments
from owlore.kernels.projector import (
    basis_shape,
    find_basis,
    project,
    project_back,
    projected_shape,
    projects_right,
    rotate_moments,
)
from owlore.kernels.rounding import stochastic_round
from owlore.kernels.seeds import generator_for
from owlore.optim.moments import Moments, moment_bytes


class Weights(Enum):
    """How a 16-bit weight takes an update; fp32 weights are always updated in place."""

    MASTER = "an fp32 master lives beside the weight while it is active"
    NEAREST = "no master; each update is rounded to nearest"
    STOCHASTIC = "no master; each update is rounded stochastically"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one parameter is updated.

    rank: projection to this rank where the smaller side is larger, None for none. scale: GaLore's factor on projected
    updates. refresh: steps between bases, None for one basis an activation. larger: project the larger side instead of
    the smaller. bits: of each moment, 32 or 8.
    """

    adam: AdamW = field(default_factory=AdamW)
    rank: int | None = None
    scale: float = 1.0
    refresh: int | None = None
    larger: bool = False
    bits: int = 32

    def projects(self, shape: torch.Size | tuple[int, ...]) -> bool:
        return self.rank is not None and len(shape) == 2 and min(shape) > self.rank


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """Bytes of optimizer state by kind."""

    masters: int = 0
    moments: int = 0
    projectors: int = 0

    def __add__(self, other: HeldBytes) -> HeldBytes:
        return HeldBytes(
            masters=self.masters + other.masters,
            moments=self.moments + other.moments,
            projectors=self.projectors + other.projectors,
        )

    @property
    def total(self) -> int:
        return self.masters + self.moments + self.projectors


def planned_bytes(shape: tuple[int, ...], dtype: torch.dtype, rule: Rule, weights: Weights) -> HeldBytes:
    """What a slot for a parameter of this shape will hold, by formula; the tests compare it with what is counted."""
    count = int(torch.Size(shape).numel())
    masters = 4 * count if dtype != torch.float32 and weights is Weights.MASTER else 0
    if not rule.projects(shape):
        return HeldBytes(masters=masters, moments=moment_bytes(count, rule.bits))
    assert rule.rank is not None
    rows, cols = shape
    small = int(torch.Size(projected_shape(rows, cols, rule.rank, rule.larger)).numel())
    basis = int(torch.Size(basis_shape(rows, cols, rule.rank, rule.larger)).numel())
    return HeldBytes(masters=masters, moments=moment_bytes(small, rule.bits), projectors=4 * basis)


class Slot:
    """State of one active parameter, born at activation."""

    def __init__(self, name: str, parameter: nn.Parameter, rule: Rule, *, weights: Weights, seed: int) -> None:
        self.name, self.parameter, self.rule, self.weights, self.seed = name, parameter, rule, weights, seed
        self.projected = rule.projects(parameter.shape)
        self.right = self.projected and projects_right(parameter.shape[0], parameter.shape[1], rule.larger)
        keeps_master = parameter.dtype != torch.float32 and weights is Weights.MASTER
        self.master: Tensor | None = parameter.detach().float() if keeps_master else None
        shape: tuple[int, ...] = tuple(parameter.shape)
        if self.projected:
            shape = projected_shape(shape[0], shape[1], rule.rank or 0, rule.larger)
        self.moments = Moments(shape, bits=rule.bits, device=parameter.device)
        self.basis: Tensor | None = None
        self.updates = 0  # Adam's step count
        self.basis_age: int | None = None  # updates since the basis was found; None asks for a new one
        self.gathered: Tensor | None = None  # in the space of the moments
        self.whole: Tensor | None = None  # full gradient, only while a basis is due

    # -- gradients ---------------------------------------------------------------------------------------------------

    @property
    def basis_due(self) -> bool:
        if not self.projected:
            return False
        return self.basis_age is None or (self.rule.refresh is not None and self.basis_age >= self.rule.refresh)

    def receive(self, gradient: Tensor, *, last: bool, step: int) -> None:
        """Take in the gradient of one micro-batch; the caller gives the tensor away."""
        if self.basis_due:
            self.whole = _added(self.whole, gradient)
            if last:
                self.settle(step)
        elif self.projected:
            assert self.basis is not None
            self.gathered = _added(self.gathered, project(gradient.float(), self.basis, self.right))
        else:
            self.gathered = _added(self.gathered, gradient)

    def settle(self, step: int) -> None:
        """Find the basis that is due from the whole batch's gradient, carry the moments over, project.

        A gradient with NaN or infinity has no basis: what is gathered is then NaN, which the norm shows before any
        update, and moments and basis stay as they were.
        """
        if self.whole is None:
            return
        assert self.rule.rank is not None
        stream = generator_for(self.seed, "basis", self.name, step)
        try:
            fresh = find_basis(self.whole, self.rule.rank, generator=stream, start=self.basis, larger=self.rule.larger)
            fresh = fresh.contiguous()  # as it comes back from a checkpoint; a product rounds by its operands' strides
        except FloatingPointError:
            rows, cols = self.whole.shape
            small = projected_shape(rows, cols, self.rule.rank, self.rule.larger)
            self.gathered, self.whole = self.whole.new_full(small, torch.nan), None
            return
        if self.basis is not None:
            self.moments.write(*rotate_moments(*self.moments.read(), self.basis, fresh, self.right))
        self.basis, self.basis_age = fresh, 0
        self.gathered = project(self.whole, fresh, self.right)
        self.whole = None

    @property
    def has_gradient(self) -> bool:
        return self.whole is not None or self.gathered is not None

    def pending(self) -> Tensor:
        """What this step has gathered and not yet used, to be added to in place; zeros where nothing came."""
        if self.basis_due:
            if self.whole is None:
                self.whole = torch.zeros_like(self.parameter, dtype=torch.float32)
            return self.whole
        if self.gathered is None:
            self.gathered = torch.zeros(self.moments.shape, device=self.parameter.device)
        return self.gathered

    def renew(self) -> None:
        """A new activation begins: the next gradient brings a new basis, the moments stay."""
        self.basis_age = None

    # -- update ------------------------------------------------------------------------------------------------------

    def norm_squared(self) -> Tensor | None:
        """Squared norm of the gathered gradient (in the projected space where projected), fp32 scalar."""
        return None if self.gathered is None else self.gathered.square().sum()

    @torch.no_grad()
    def update(self, lr: float, clip_factor: Tensor | float, step: int) -> None:
        """One AdamW step from what was gathered, which is freed. Without a gradient nothing changes."""
        if self.gathered is None:
            return
        adam = self.rule.adam
        gradient, self.gathered = self.gathered.mul_(clip_factor), None
        self.updates += 1
        mean, square = self.moments.read()
        update_moments(gradient, mean, square, adam)
        del gradient
        change = direction(mean, square, self.updates, adam)
        self.moments.write(mean, square)
        del mean, square
        if self.projected:
            assert self.basis is not None and self.basis_age is not None
            change = project_back(change, self.basis, self.right)
            self.basis_age += 1
        rate = lr * self.rule.scale if self.projected else lr
        self._write(change, rate=rate, shrink=1 - lr * adam.decay, step=step)

    def _write(self, change: Tensor, *, rate: float, shrink: float, step: int) -> None:
        """W <- shrink * W - rate * change, in the precision that `weights` names."""
        parameter = self.parameter.data
        target = parameter if parameter.dtype == torch.float32 else self.master
        exact = parameter.float() if target is None else target
        if shrink != 1.0:
            exact.mul_(shrink)
        exact.add_(change, alpha=-rate)
        if exact is parameter:
            return
        if self.weights is Weights.STOCHASTIC:
            stream = generator_for(self.seed, "update", self.name, step, device=parameter.device)
            parameter.copy_(stochastic_round(exact, parameter.dtype, stream))
        else:
            parameter.copy_(exact)

    @torch.no_grad()
    def retire(self, step: int) -> float:
        """Write the master back with seeded stochastic rounding; returns the norm of what rounding lost."""
        if self.master is None:
            return 0.0
        stream = generator_for(self.seed, "retire", self.name, step, device=self.parameter.device)
        rounded = stochastic_round(self.master, self.parameter.dtype, stream)
        self.parameter.data.copy_(rounded)
        lost = float(torch.linalg.vector_norm(self.master - rounded.float()))
        self.master = None
        return lost

    # -- state -------------------------------------------------------------------------------------------------------

    def held(self) -> HeldBytes:
        """Bytes held now, counted tensor by tensor."""
        return HeldBytes(masters=_bytes(self.master), moments=self.moments.num_bytes(), projectors=_bytes(self.basis))

    def tensors(self) -> dict[str, Tensor]:
        found = {"basis": self.basis, "master": self.master}
        return self.moments.tensors() | {key: value for key, value in found.items() if value is not None}

    def counters(self) -> dict[str, int | None]:
        return {"updates": self.updates, "basis_age": self.basis_age}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int | None]) -> None:
        """Take over saved state, bit for bit."""
        device = self.parameter.device
        self.moments.restore(tensors, device)
        self.basis = tensors["basis"].to(device) if "basis" in tensors else None
        if self.master is not None and "master" in tensors:
            self.master = tensors["master"].to(device)
        self.updates, self.basis_age = int(counters["updates"] or 0), counters["basis_age"]


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """total + part in fp32; the first part becomes the total without a copy."""
    return part.float() if total is None else total.add_(part)


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()

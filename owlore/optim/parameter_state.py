"""Everything that one active parameter holds: master, moments, basis and the gradient gathered so far.

A gradient enters through `receive` micro-batch by micro-batch and is projected at once (`accumulate_factored`: without
being made), so accumulation, norm and clipping all happen in the projected space. Only when a new basis is due does the
sum of full gradients live until the last micro-batch, because the basis has to see the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn

from owlore.kernels.adamw import AdamW, adamw_update_
from owlore.kernels.full_rank_update import apollo_update, fira_residual, limited, random_basis
from owlore.kernels.projector import (
    add_projected_back,
    basis_shape,
    find_basis,
    is_cheaper_in_products,
    project,
    project_back,
    project_product,
    projected_shape,
    projects_right,
    rotate_moments,
)
from owlore.kernels.rounding import stochastic_round
from owlore.kernels.seeds import generator_for
from owlore.optim.moments import Moments, moment_bytes


class MasterPolicy(Enum):
    """How a 16-bit weight takes an update; fp32 weights are always updated in place."""

    MASTER = "an fp32 master lives beside the weight while it is active"
    NEAREST = "no master; each update is rounded to nearest"
    STOCHASTIC = "no master; each update is rounded stochastically"


FULL_RANK = ("fira", "apollo", "apollo-mini")


@dataclass(frozen=True, kw_only=True)
class UpdateSpec:
    """How one parameter is updated.

    rank: projection to this rank where the smaller side is larger, None for none. scale: GaLore's factor on projected
    updates. refresh: steps between bases, None for one basis an activation. larger: project the larger side instead of
    the smaller. bits: of each moment, 32 or 8. rotate: express the moments in a new basis; else they stay as they are.
    full_rank: an update of full rank made of the projected one, one of `FULL_RANK`; it holds the whole batch's gradient
    until the update. limit: how much the norm of such an update may grow in a step.
    """

    adam: AdamW = field(default_factory=AdamW)
    rank: int | None = None
    scale: float = 1.0
    refresh: int | None = None
    larger: bool = False
    bits: int = 32
    rotate: bool = True
    full_rank: str | None = None
    limit: float = 1.01

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


def planned_state_bytes(
    shape: tuple[int, ...], dtype: torch.dtype, rule: UpdateSpec, weights: MasterPolicy
) -> HeldBytes:
    """What a state for a parameter of this shape will hold, by formula; the tests compare it with what is counted."""
    count = int(torch.Size(shape).numel())
    masters = 4 * count if dtype != torch.float32 and weights is MasterPolicy.MASTER else 0
    if not rule.projects(shape):
        return HeldBytes(masters=masters, moments=moment_bytes(count, rule.bits))
    assert rule.rank is not None
    rows, cols = shape
    small = int(torch.Size(projected_shape(rows, cols, rule.rank, rule.larger)).numel())
    basis = int(torch.Size(basis_shape(rows, cols, rule.rank, rule.larger)).numel())
    limiter = 4 if rule.full_rank else 0
    return HeldBytes(masters=masters, moments=moment_bytes(small, rule.bits), projectors=4 * basis + limiter)


class ParameterState:
    """State of one active parameter, born at activation."""

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        rule: UpdateSpec,
        *,
        weights: MasterPolicy,
        seed: int,
        grad_scale: float = 1.0,
    ) -> None:
        self.name, self.parameter, self.rule, self.weights, self.seed = name, parameter, rule, weights, seed
        self.grad_scale = grad_scale
        self.projected = rule.projects(parameter.shape)
        self.right = self.projected and projects_right(parameter.shape[0], parameter.shape[1], rule.larger)
        keeps_master = parameter.dtype != torch.float32 and weights is MasterPolicy.MASTER
        self.master: Tensor | None = parameter.detach().float() if keeps_master else None
        shape: tuple[int, ...] = tuple(parameter.shape)
        if self.projected:
            shape = projected_shape(shape[0], shape[1], self._rank, rule.larger)
        self.moments = Moments(shape, bits=rule.bits, device=parameter.device)
        self.basis: Tensor | None = None
        self.updates = 0  # Adam's step count
        self.basis_age: int | None = None  # updates since the basis was found; None asks for a new one
        self.gathered: Tensor | None = None  # in the space of the moments
        self.full_gradient: Tensor | None = (
            None  # full gradient, only while a basis is due or an update of full rank needs it
        )
        self.is_full_rank = self.projected and rule.full_rank is not None
        self.limiter = torch.zeros((), device=parameter.device) if self.is_full_rank else None  # norm of the last one

    # -- gradients ---------------------------------------------------------------------------------------------------

    @property
    def _rank(self) -> int:
        assert self.rule.rank is not None
        return self.rule.rank

    @property
    def basis_due(self) -> bool:
        if not self.projected:
            return False
        return self.basis_age is None or (self.rule.refresh is not None and self.basis_age >= self.rule.refresh)

    def accumulate(self, gradient: Tensor, *, last: bool, step: int) -> None:
        """Take in the gradient of one micro-batch (times grad_scale); the caller gives the tensor away."""
        gradient = self._unscaled(gradient)
        if self.basis_due or self.is_full_rank:
            self.full_gradient = _added(self.full_gradient, gradient)
            if last:
                self.refresh_basis(step)
        elif self.projected:
            assert self.basis is not None
            self.gathered = _added(self.gathered, project(gradient, self.basis, self.right))
        else:
            self.gathered = _added(self.gathered, gradient)

    @property
    def accepts_factors(self) -> bool:
        """Is it worth while to project the gradient's factors and not the gradient, when the basis is known?"""
        if not self.projected or self.is_full_rank:
            return False
        rows, cols = self.parameter.shape
        return is_cheaper_in_products(rows, cols, self._rank)

    def accumulate_factored(self, left: Tensor, other: Tensor) -> Tensor | None:
        """Take in the gradient left^T other (times grad_scale) of one micro-batch; in the step that finds a basis,
        which has to see it, it is returned, for `receive` to be called with. That step is told by the basis, which no
        update has used: a step that was broken off after the search and is taken up again rounds as it would have."""
        if self.basis_due or self.basis_age == 0:
            return left.T @ other
        assert self.basis is not None
        part = project_product(left, other, self.basis, self.right)
        self.gathered = _added(self.gathered, self._unscaled(part))
        return None

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient if self.grad_scale == 1.0 else gradient.float().div_(self.grad_scale)

    def refresh_basis(self, step: int) -> None:
        """Find the basis that is due from the whole batch's gradient, carry the moments over, project.

        A gradient with NaN or infinity has no basis: what is gathered is then NaN, which the norm shows before any
        update, and moments and basis stay as they were.
        """
        if self.full_gradient is None or self.gathered is not None:
            return
        if self.basis_due and not self._new_basis(self.full_gradient, step):
            self.full_gradient = None
            return
        assert self.basis is not None
        self.gathered = project(self.full_gradient, self.basis, self.right)
        if not self.is_full_rank:
            self.full_gradient = None

    def _new_basis(self, gradient: Tensor, step: int) -> bool:
        """Find it and carry the moments over; without one, False and NaN as what is gathered."""
        rows, cols = gradient.shape
        if self.rule.full_rank in ("apollo", "apollo-mini"):
            stream = generator_for(self.seed, "basis", self.name, step)
            side = basis_shape(rows, cols, self._rank, self.rule.larger)[0]
            self.basis = random_basis(side, self._rank, generator=stream).to(gradient.device)
            self.basis_age = 0
            return True
        stream = generator_for(self.seed, "basis", self.name, step, device=gradient.device)
        try:
            fresh = find_basis(gradient, self._rank, generator=stream, start=self.basis, larger=self.rule.larger)
            fresh = fresh.contiguous()  # as it comes back from a checkpoint; a product rounds by its operands' strides
        except FloatingPointError:
            self.gathered = gradient.new_full(projected_shape(rows, cols, self._rank, self.rule.larger), torch.nan)
            return False
        if self.basis is not None and self.rule.rotate:
            self.moments.write(*rotate_moments(*self.moments.read(), self.basis, fresh, self.right))
        self.basis, self.basis_age = fresh, 0
        return True

    @property
    def has_gradient(self) -> bool:
        return self.full_gradient is not None or self.gathered is not None

    def pending(self) -> Tensor:
        """What this step has gathered and not yet used, to be added to in place; zeros where nothing came."""
        if self.basis_due or self.is_full_rank:
            if self.full_gradient is None:
                self.full_gradient = torch.zeros_like(self.parameter, dtype=torch.float32)
            return self.full_gradient
        if self.gathered is None:
            self.gathered = torch.zeros(self.moments.shape, device=self.parameter.device)
        return self.gathered

    def reset_basis(self) -> None:
        """A new activation begins: the next gradient brings a new basis, the moments stay."""
        self.basis_age = None

    # -- update ------------------------------------------------------------------------------------------------------

    def norm_squared(self) -> Tensor | None:
        """Squared norm of the gathered gradient (in the projected space where that is all that is used), fp32."""
        part = self.full_gradient if self.is_full_rank and self.full_gradient is not None else self.gathered
        return None if part is None else torch.linalg.vector_norm(part).square()

    @torch.no_grad()
    def update(self, lr: float, clip_factor: Tensor | float, step: int) -> None:
        """One AdamW step from what was gathered, which is freed. Without a gradient nothing changes."""
        if self.gathered is None:
            return
        adam = self.rule.adam
        gradient, self.gathered = self.gathered.mul_(clip_factor), None
        self.updates += 1
        mean, square = self.moments.read()
        change = adamw_update_(gradient.clone() if self.is_full_rank else gradient, mean, square, self.updates, adam)
        self.moments.write(mean, square)
        del mean, square
        if self.projected:
            assert self.basis is not None and self.basis_age is not None
            self.basis_age += 1
            if self.is_full_rank:
                change = self._of_full_rank(change, gradient, clip_factor)
        rate = lr * self.rule.scale if self.projected else lr
        self._write(change, rate=rate, shrink=1 - lr * adam.decay, step=step)

    def _of_full_rank(self, update: Tensor, projected: Tensor, clip_factor: Tensor | float) -> Tensor:
        """The change that the projected one and the whole gradient make together."""
        assert self.basis is not None and self.full_gradient is not None and self.limiter is not None
        whole, self.full_gradient = self.full_gradient.mul_(clip_factor), None
        if self.rule.full_rank == "fira":
            beside = fira_residual(whole, projected, update, self.basis, self.right)
        else:
            beside = apollo_update(
                whole, projected, update, self.right, tensorwise=self.rule.full_rank == "apollo-mini"
            )
        beside, self.limiter = limited(beside, self.limiter, self.rule.limit)
        return beside.add_(project_back(update, self.basis, self.right)) if self.rule.full_rank == "fira" else beside

    def _write(self, change: Tensor, *, rate: float, shrink: float, step: int) -> None:
        """W <- shrink * W - rate * change, in the precision that `weights` names; a projected change is projected back
        as it is added, so that it never exists in the weight's size."""
        parameter = self.parameter.data
        target = parameter if parameter.dtype == torch.float32 else self.master
        exact = parameter.float() if target is None else target
        if self.projected and not self.is_full_rank:
            assert self.basis is not None
            add_projected_back(exact, change, self.basis, self.right, beta=shrink, alpha=-rate)
        else:
            if shrink != 1.0:
                exact.mul_(shrink)
            exact.add_(change, alpha=-rate)
        if exact is parameter:
            return
        if self.weights is MasterPolicy.STOCHASTIC:
            stream = generator_for(self.seed, "update", self.name, step, device=parameter.device)
            parameter.copy_(stochastic_round(exact, parameter.dtype, stream))
        else:
            parameter.copy_(exact)

    @torch.no_grad()
    def write_back(self, step: int) -> float:
        """Write the master back with seeded stochastic rounding; returns the norm of what rounding lost."""
        if self.master is None:
            return 0.0
        stream = generator_for(self.seed, "write_back", self.name, step, device=self.parameter.device)
        rounded = stochastic_round(self.master, self.parameter.dtype, stream)
        self.parameter.data.copy_(rounded)
        lost = float(torch.linalg.vector_norm(self.master - rounded.float()))
        self.master = None
        return lost

    # -- state -------------------------------------------------------------------------------------------------------

    def held(self) -> HeldBytes:
        """Bytes held now, counted tensor by tensor."""
        return HeldBytes(
            masters=_bytes(self.master),
            moments=self.moments.num_bytes(),
            projectors=_bytes(self.basis) + _bytes(self.limiter),
        )

    def tensors(self) -> dict[str, Tensor]:
        found = {"basis": self.basis, "master": self.master, "limiter": self.limiter}
        return self.moments.tensors() | {key: value for key, value in found.items() if value is not None}

    def counters(self) -> dict[str, int | None]:
        return {"updates": self.updates, "basis_age": self.basis_age}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int | None]) -> None:
        """Take over saved state, bit for bit."""
        device = self.parameter.device
        self.moments.restore(tensors, device)
        self.basis = tensors["basis"].to(device) if "basis" in tensors else None
        if self.limiter is not None and "limiter" in tensors:
            self.limiter = tensors["limiter"].to(device)
        if self.master is not None and "master" in tensors:
            self.master = tensors["master"].to(device)
        self.updates, self.basis_age = int(counters["updates"] or 0), counters["basis_age"]


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """total + part in fp32; the first part becomes the total without a copy."""
    return part.float() if total is None else total.add_(part)


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()

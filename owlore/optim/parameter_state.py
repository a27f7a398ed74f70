"""Everything that one active parameter holds: master, moments, basis and the gradient accumulated so far.

There are three kinds of state: `ParameterState` (dense), `ProjectedState` (the gradient
is projected to low rank as it arrives, so that accumulation, norm and clipping happen in the projected space) and
`FullRankState` (an update of full rank is made of the projected one). `new_state` makes the one that an `UpdateSpec`
asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from owlore.choices import APOLLO, FIRA
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
)
from owlore.kernels.rounding import stochastic_round
from owlore.kernels.seeds import generator_for
from owlore.optim.update_rules import UPDATE_RULES
from owlore.optim.update_spec import HeldBytes, MasterPolicy, UpdateSpec


@dataclass(eq=False, repr=False)
class ParameterState:
    """State of an active parameter whose gradient is used as it is (dense).

    Attributes:
        name: name of the parameter in the model; the random streams of rounding depend on it.
        parameter: the parameter, where it lies.
        spec: how it is updated.
        policy: how a 16-bit parameter takes updates.
        seed: seed of the run.
        grad_scale: factor that the loss was multiplied with, divided out of each gradient.
        accumulated: sum of the micro-batches' gradients, fp32, in the space of the moments; None before the first.
        updates: number of updates so far.
    """

    name: str
    parameter: nn.Parameter
    spec: UpdateSpec
    policy: MasterPolicy
    seed: int
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        keeps_master = self.parameter.dtype != torch.float32 and self.policy is MasterPolicy.MASTER
        self.master: Tensor | None = self.parameter.detach().float() if keeps_master else None
        self.moments = UPDATE_RULES[self.spec.rule](self.shape, bits=self.spec.bits, device=self.parameter.device)
        self.accumulated: Tensor | None = None
        self.updates = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the accumulated gradient and of the moments."""
        return tuple(self.parameter.shape)

    @property
    def accepts_factors(self) -> bool:
        """Whether `accumulate_factored` saves work."""
        return False

    # -- gradients ---------------------------------------------------------------------------------------------------

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient of this step has arrived."""
        return self.accumulated is not None

    def accumulate(self, gradient: Tensor, *, last: bool, step: int) -> None:
        """Add the gradient of one micro-batch.

        Args:
            gradient: of the parameter's shape, times `grad_scale`; its memory may be reused.
            last: whether no other gradient of this step follows.
            step: global step, from 0.
        """
        del last, step
        self.accumulated = _added(self.accumulated, self._unscaled(gradient))

    def accumulate_factored(self, left: Tensor, right: Tensor) -> Tensor | None:
        """Add the gradient left^T right (times `grad_scale`) of one micro-batch, if that can be done without making it.

        Args:
            left: T x m, for T tokens and a parameter of m x n.
            right: T x n.

        Returns:
            None when it was added, else the gradient, for `accumulate` to be called with.
        """
        return left.T @ right

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient if self.grad_scale == 1.0 else gradient.float().div_(self.grad_scale)

    def refresh_basis(self, step: int) -> None:
        """Find the basis that is due, in a state that has one.

        Args:
            step: global step, from 0.
        """

    def reset_basis(self) -> None:
        """Begin a new activation: the next gradient gives a new basis, in a state that has one; the moments stay."""

    def pending(self) -> Tensor:
        """The sum that the next update uses, for other processes to add to in place; zeros where no gradient came."""
        if self.accumulated is None:
            self.accumulated = torch.zeros(self.shape, device=self.parameter.device)
        return self.accumulated

    def norm_squared(self) -> Tensor | None:
        """Squared norm (fp32) of the accumulated gradient, in the space in which it is used; None without one."""
        return None if self.accumulated is None else torch.linalg.vector_norm(self.accumulated).square()

    # -- update ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, lr: float, clip_factor: Tensor | float, step: int) -> None:
        """Update the parameter from the accumulated gradient, which is freed; without a gradient nothing changes.

        Args:
            lr: learning rate.
            clip_factor: factor in [0, 1] on the gradient.
            step: global step, from 0; the random stream of stochastic rounding depends on it.
        """
        if self.accumulated is None:
            return
        gradient, self.accumulated = self.accumulated.mul_(clip_factor), None
        self.updates += 1
        change = self._change(gradient, clip_factor)
        parameter = self.parameter.data
        exact = parameter.float() if self.master is None else self.master  # in fp32 the parameter itself
        self._add_change(exact, change, lr=lr, keep=1 - lr * self.spec.adam.decay)
        if exact is parameter:
            return
        if self.policy is MasterPolicy.STOCHASTIC:
            stream = generator_for(self.seed, "update", self.name, step, device=parameter.device)
            parameter.copy_(stochastic_round(exact, parameter.dtype, stream))
        else:
            parameter.copy_(exact)

    def _change(self, gradient: Tensor, clip_factor: Tensor | float) -> Tensor:
        """Direction of the update, from the clipped accumulated gradient, which is used up."""
        del clip_factor
        return self.moments.update(gradient, self.updates, self.spec.adam)

    def _add_change(self, weight: Tensor, change: Tensor, *, lr: float, keep: float) -> None:
        """weight <- keep * weight - lr * change, in fp32."""
        if keep != 1.0:
            weight.mul_(keep)
        weight.add_(change, alpha=-lr)

    @torch.no_grad()
    def write_back(self, step: int) -> float:
        """Round the master into the parameter stochastically and drop it.

        Args:
            step: global step, from 0; the random stream depends on it.

        Returns:
            The norm of what rounding lost; 0 without a master.
        """
        if self.master is None:
            return 0.0
        stream = generator_for(self.seed, "retire", self.name, step, device=self.parameter.device)
        rounded = stochastic_round(self.master, self.parameter.dtype, stream)
        self.parameter.data.copy_(rounded)
        lost = float(torch.linalg.vector_norm(self.master - rounded.float()))
        self.master = None
        return lost

    # -- what is held ------------------------------------------------------------------------------------------------

    def held(self) -> HeldBytes:
        """Bytes of the state, counted tensor by tensor."""
        moments = self.moments.tensors().values()
        return HeldBytes(masters=_bytes(self.master), moments=sum(map(_bytes, moments)))

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, as a checkpoint stores it."""
        return self.moments.tensors() | ({} if self.master is None else {"master": self.master})

    def counters(self) -> dict[str, int | None]:
        """What a checkpoint stores beside the tensors, as JSON."""
        return {"updates": self.updates, "basis_age": None}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int | None]) -> None:
        """Restore what `tensors` and `counters` returned, bit for bit.

        Args:
            tensors: the state by name.
            counters: the counters by name.
        """
        self.moments.restore(tensors, self.parameter.device)
        if self.master is not None and "master" in tensors:
            self.master = tensors["master"].to(self.parameter.device)
        self.updates = int(counters["updates"] or 0)


class ProjectedState(ParameterState):
    """State of an active matrix whose gradient is projected to rank r as it arrives.

    In a step that finds a new basis the sum of full gradients is held until the last micro-batch, because the basis is
    found from the whole batch's gradient.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, cols = self.parameter.shape
        self.right = projects_right(rows, cols, self.spec.larger)
        self.basis: Tensor | None = None
        self.basis_age: int | None = None  # updates since the basis was found; None asks for a new one
        self.full_gradient: Tensor | None = None  # sum of unprojected gradients, while it is needed

    @property
    def rank(self) -> int:
        """Rank of the projection."""
        assert self.spec.rank is not None
        return self.spec.rank

    @property
    def shape(self) -> tuple[int, ...]:
        rows, cols = self.parameter.shape
        return projected_shape(rows, cols, self.rank, self.spec.larger)

    @property
    def accepts_factors(self) -> bool:
        rows, cols = self.parameter.shape
        return is_cheaper_in_products(rows, cols, self.rank)

    @property
    def basis_due(self) -> bool:
        """Whether this step has to find a new basis."""
        return self.basis_age is None or (self.spec.refresh is not None and self.basis_age >= self.spec.refresh)

    @property
    def sums_full_gradient(self) -> bool:
        """Whether this step needs the sum of full gradients."""
        return self.basis_due

    @property
    def rotates_moments(self) -> bool:
        """Whether a new basis rotates the moments."""
        return self.spec.rotate

    @property
    def has_gradient(self) -> bool:
        return self.full_gradient is not None or self.accumulated is not None

    def accumulate(self, gradient: Tensor, *, last: bool, step: int) -> None:
        gradient = self._unscaled(gradient)
        if self.sums_full_gradient:
            self.full_gradient = _added(self.full_gradient, gradient)
            if last:
                self.refresh_basis(step)
        else:
            assert self.basis is not None
            self.accumulated = _added(self.accumulated, project(gradient, self.basis, self.right))

    def accumulate_factored(self, left: Tensor, right: Tensor) -> Tensor | None:
        # No update has used the basis (age 0) in the step that found it. A step that failed after the search and is
        # taken again must round as it would have, so it takes the full gradient too.
        if self.basis_due or self.basis_age == 0:
            return left.T @ right
        assert self.basis is not None
        part = project_product(left, right, self.basis, self.right)
        self.accumulated = _added(self.accumulated, self._unscaled(part))
        return None

    def refresh_basis(self, step: int) -> None:
        """Find the basis that is due from the whole batch's gradient, rotate the moments and project the gradient.

        A gradient with NaN or infinity has no basis: what is accumulated is then NaN, which the norm shows before any
        update, and moments and basis stay as they were.

        Args:
            step: global step, from 0; the random stream of the search depends on it.
        """
        if self.full_gradient is None or self.accumulated is not None:
            return
        if self.basis_due:
            try:
                fresh = self._find_basis(self.full_gradient, step)
            except FloatingPointError:
                self.accumulated = self.full_gradient.new_full(self.shape, torch.nan)
                self.full_gradient = None
                return
            if self.basis is not None and self.rotates_moments:
                self.moments.rotate(self.basis, fresh, self.right)
            self.basis, self.basis_age = fresh, 0
        assert self.basis is not None
        self.accumulated = project(self.full_gradient, self.basis, self.right)
        self._drop_full_gradient()

    def _find_basis(self, gradient: Tensor, step: int) -> Tensor:
        stream = generator_for(self.seed, "basis", self.name, step, device=gradient.device)
        fresh = find_basis(gradient, self.rank, generator=stream, start=self.basis, larger=self.spec.larger)
        return fresh.contiguous()  # as it comes back from a checkpoint; a product rounds by its operands' strides

    def _drop_full_gradient(self) -> None:
        self.full_gradient = None

    def reset_basis(self) -> None:
        self.basis_age = None

    def pending(self) -> Tensor:
        if not self.sums_full_gradient:
            return super().pending()
        if self.full_gradient is None:
            self.full_gradient = torch.zeros_like(self.parameter, dtype=torch.float32)
        return self.full_gradient

    def _change(self, gradient: Tensor, clip_factor: Tensor | float) -> Tensor:
        assert self.basis_age is not None
        self.basis_age += 1
        return super()._change(gradient, clip_factor)

    def _add_change(self, weight: Tensor, change: Tensor, *, lr: float, keep: float) -> None:
        """The change is projected back as it is added, so that it never exists in the weight's size."""
        assert self.basis is not None
        rate = lr * self.spec.scale
        add_projected_back(weight, change, self.basis, self.right, beta=keep, alpha=-rate)

    def held(self) -> HeldBytes:
        return super().held() + HeldBytes(projectors=_bytes(self.basis))

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | ({} if self.basis is None else {"basis": self.basis})

    def counters(self) -> dict[str, int | None]:
        return super().counters() | {"basis_age": self.basis_age}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int | None]) -> None:
        super().restore(tensors, counters)
        self.basis = tensors["basis"].to(self.parameter.device) if "basis" in tensors else None
        self.basis_age = counters["basis_age"]


class FullRankState(ProjectedState):
    """State of an active matrix whose full-rank update is made of the projected one (Fira, APOLLO).

    The sum of full gradients is held until the update.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.limiter = torch.zeros((), device=self.parameter.device)  # norm of the last full-rank update

    @property
    def accepts_factors(self) -> bool:
        return False

    @property
    def sums_full_gradient(self) -> bool:
        return True

    @property
    def rotates_moments(self) -> bool:
        return self.spec.rotate and self.spec.full_rank == "fira"  # APOLLO's random bases span unrelated axes

    def _find_basis(self, gradient: Tensor, step: int) -> Tensor:
        if self.spec.full_rank == "fira":
            return super()._find_basis(gradient, step)
        stream = generator_for(self.seed, "basis", self.name, step)
        rows, cols = gradient.shape
        side = basis_shape(rows, cols, self.rank, self.spec.larger)[0]
        return random_basis(side, self.rank, generator=stream).to(gradient.device)

    def _drop_full_gradient(self) -> None:
        """Keep it, because the update needs it."""

    def norm_squared(self) -> Tensor | None:
        if self.full_gradient is None:
            return super().norm_squared()
        return torch.linalg.vector_norm(self.full_gradient).square()

    def _change(self, gradient: Tensor, clip_factor: Tensor | float) -> Tensor:
        update = super()._change(gradient.clone(), clip_factor)
        assert self.basis is not None and self.full_gradient is not None
        full, self.full_gradient = self.full_gradient.mul_(clip_factor), None
        if self.spec.full_rank == "fira":
            residual = fira_residual(full, gradient, update, self.basis, self.right)
            residual, self.limiter = limited(residual, self.limiter, self.spec.limit)
            return residual.add_(project_back(update, self.basis, self.right))
        tensorwise = self.spec.full_rank == "apollo-mini"
        change = apollo_update(full, gradient, update, self.right, tensorwise=tensorwise)
        change, self.limiter = limited(change, self.limiter, self.spec.limit)
        return change

    def _add_change(self, weight: Tensor, change: Tensor, *, lr: float, keep: float) -> None:
        ParameterState._add_change(self, weight, change, lr=lr * self.spec.scale, keep=keep)

    def held(self) -> HeldBytes:
        return super().held() + HeldBytes(projectors=_bytes(self.limiter))

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"limiter": self.limiter}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int | None]) -> None:
        super().restore(tensors, counters)
        if "limiter" in tensors:
            self.limiter = tensors["limiter"].to(self.parameter.device)


def new_state(
    name: str, parameter: nn.Parameter, spec: UpdateSpec, *, policy: MasterPolicy, seed: int, grad_scale: float = 1.0
) -> ParameterState:
    """The state of a parameter that becomes active, of the kind that `spec` asks for.

    Args:
        name: name of the parameter in the model.
        parameter: the parameter, where it lies.
        spec: how it is updated.
        policy: how a 16-bit parameter takes updates.
        seed: seed of the run.
        grad_scale: factor that the loss was multiplied with, divided out of each gradient.

    Raises:
        ValueError: `spec.full_rank` names no update.
    """
    if spec.full_rank not in (None, *FIRA, *APOLLO):
        raise ValueError(f"full_rank got {spec.full_rank!r}, expected one of {', '.join((*FIRA, *APOLLO))}")
    kind: type[ParameterState] = ParameterState
    if spec.projects(parameter.shape):
        kind = ProjectedState if spec.full_rank is None else FullRankState
    return kind(name, parameter, spec, policy=policy, seed=seed, grad_scale=grad_scale)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """total + part in fp32; the first part becomes the total without a copy."""
    return part.float() if total is None else total.add_(part)


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes

"""How a strategy wants a parameter to be updated, and the bytes that follow before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from owlore.kernels.adamw import AdamW
from owlore.kernels.projector import basis_shape, projected_shape
from owlore.optim.update_rules import UPDATE_RULES


class MasterPolicy(Enum):
    """How a 16-bit weight takes an update; fp32 weights are always updated in place."""

    MASTER = "an fp32 master is kept beside the weight while it is active"
    NEAREST = "no master; each update is rounded to nearest"
    STOCHASTIC = "no master; each update is rounded stochastically"


@dataclass(frozen=True, kw_only=True)
class UpdateSpec:
    """How one parameter is updated.

    Attributes:
        adam: constants of AdamW.
        rule: name of the update rule in `UPDATE_RULES`.
        rank: a matrix whose smaller side is larger than this is projected to this rank; None for no projection.
        scale: GaLore's factor on projected updates.
        refresh: steps between bases; None for one basis an activation.
        larger: whether the larger side is projected instead of the smaller.
        bits: bits of each value of the rule's state, 32 or 8.
        rotate: whether a new basis rotates the state; else the state stays as it is.
        full_rank: `fira`, `apollo` or `apollo-mini`: an update of full rank is made of the projected one, which takes
            the whole batch's gradient; None for the projected update alone.
        limit: factor by which the norm of a full-rank update may grow in a step.
    """

    adam: AdamW = field(default_factory=AdamW)
    rule: str = "adamw"
    rank: int | None = None
    scale: float = 1.0
    refresh: int | None = None
    larger: bool = False
    bits: int = 32
    rotate: bool = True
    full_rank: str | None = None
    limit: float = 1.01

    def projects(self, shape: torch.Size | tuple[int, ...]) -> bool:
        """Whether a parameter of this shape is projected."""
        return self.rank is not None and len(shape) == 2 and min(shape) > self.rank


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """Bytes of optimizer state by kind.

    Attributes:
        masters: fp32 masters of 16-bit parameters.
        moments: state of the update rule.
        projectors: projection bases, and the limiters of full-rank updates.
    """

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
        """Bytes of all kinds."""
        return self.masters + self.moments + self.projectors


def planned_state_bytes(
    shape: tuple[int, ...], dtype: torch.dtype, spec: UpdateSpec, policy: MasterPolicy
) -> HeldBytes:
    """Bytes of the state of an active parameter, by formula; the tests compare them with those counted.

    Args:
        shape: shape of the parameter.
        dtype: dtype of the parameter.
        spec: how it is updated.
        policy: how a 16-bit parameter takes updates.
    """
    planned = UPDATE_RULES[spec.rule].planned_bytes
    count = int(torch.Size(shape).numel())
    masters = 4 * count if dtype != torch.float32 and policy is MasterPolicy.MASTER else 0
    if not spec.projects(shape):
        return HeldBytes(masters=masters, moments=planned(count, spec.bits))
    assert spec.rank is not None
    rows, cols = shape
    small = int(torch.Size(projected_shape(rows, cols, spec.rank, spec.larger)).numel())
    basis = int(torch.Size(basis_shape(rows, cols, spec.rank, spec.larger)).numel())
    limiter = 4 if spec.full_rank else 0
    return HeldBytes(masters=masters, moments=planned(small, spec.bits), projectors=4 * basis + limiter)

"""Updates of full rank that are scaled by an optimizer's steps in the projected space: Fira and APOLLO.

R is the projected gradient and U is Adam's update from it. A channel is a row of the gradient G where the columns are
projected, and a column where the rows are. Both methods use the ratios s_i = |U_i| / |R_i| over channels.

- Fira (Chen et al. 2024, arXiv 2410.01623) adds G minus its projection, channel i times s_i, to the projected update.
- APOLLO (Zhu et al. 2024, arXiv 2412.05270) steps along G, channel i times s_i, with R from a random projection; its
  "Mini" form has one ratio |U| / |R| for all channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from owlore.kernels.projector import project_back


def channel_ratios(update: Tensor, projected: Tensor, right: bool) -> Tensor:
    """s, (m x 1) where the columns are projected (`right`), else (1 x n); 0 for a channel without gradient."""
    axis = 1 if right else 0
    sizes = torch.linalg.vector_norm(projected, dim=axis, keepdim=True)
    ratios = torch.linalg.vector_norm(update, dim=axis, keepdim=True) / sizes
    return torch.where(sizes > 0, ratios, 0.0)


def fira_residual(gradient: Tensor, projected: Tensor, update: Tensor, basis: Tensor, right: bool) -> Tensor:
    """(G - back(R)) with channel i times s_i; m x n."""
    return (gradient - project_back(projected, basis, right)).mul_(channel_ratios(update, projected, right))


def apollo_update(gradient: Tensor, projected: Tensor, update: Tensor, right: bool, *, tensorwise: bool) -> Tensor:
    """G with channel i times s_i, or with `tensorwise` all of G times |U| / |R|; m x n."""
    if not tensorwise:
        return gradient * channel_ratios(update, projected, right)
    size = torch.linalg.vector_norm(projected)
    return gradient * torch.where(size > 0, torch.linalg.vector_norm(update) / size, 0.0)


def limited(change: Tensor, previous: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The norm-growth limiter of Fira, section 4.2, which APOLLO uses as well.

    Args:
        change: The update; it is scaled in place.
        previous: Norm of the previous update, a scalar tensor; 0 before the first.
        limit: The largest growth of the norm from one update to the next.

    Returns:
        `change` with a norm of at most `limit * previous`, and that norm as a tensor, without synchronising the device.
    """
    norm = torch.linalg.vector_norm(change)
    largest = limit * previous
    factor = torch.where((previous > 0) & (norm > largest), largest / norm, 1.0)
    return change.mul_(factor), norm * factor


def random_basis(side: int, rank: int, *, generator: torch.Generator) -> Tensor:
    """(side x rank) entries of N(0, 1 / rank), fp32, so that R keeps the channels' norms in expectation."""
    return torch.randn(side, rank, generator=generator, dtype=torch.float32) / rank**0.5

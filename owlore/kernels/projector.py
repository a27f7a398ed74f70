"""GaLore's projection of a gradient to rank r, and what happens to Adam's moments when the basis changes.

Reference: Zhao et al. 2024 (GaLore, arXiv 2403.03507), section 4. For G of m x n with m >= n the basis P is the top r
right singular vectors (n x r) and R = G P; otherwise the top r left ones (m x r) and R = P^T G. The smaller side is
the one projected, which costs the fewest state bytes: r min(m, n) of basis and 2 r max(m, n) of moments. The other side
(`larger`, as optax's GaLore has it) costs r max(m, n) and 2 r min(m, n).

Deviation: the basis comes from a randomised range finder with a Rayleigh-Ritz step (Halko, Martinsson & Tropp 2011,
algorithms 4.4 and 5.1) instead of a full SVD. What matters is the captured energy ||R||^2 / ||G||^2, which is within
a fraction of a percent of the optimum; the columns are orthonormal in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUMS_WIDER = hasattr(torch.ops.aten.mm, "dtype")  # torch multiplies 16-bit matrices into an fp32 one (CUDA, from 2.8)
DEPENDENT = 1e-5  # of a Cholesky factor's diagonal, least over most: below it too much of float64 is used up


def oversample(rank: int) -> int:
    """Extra columns of the sketch, through which the last wanted directions converge: a quarter costs a fifteenth more
    time than eight columns do at rank 128 and halves what is missed of singular values like k^-0.5."""
    return max(8, rank // 4)


def projects_right(rows: int, cols: int, larger: bool = False) -> bool:
    """True when the columns (the right side) are projected: m >= n, unless the larger side is asked for."""
    return (rows >= cols) != larger


def project(gradient: Tensor, basis: Tensor, right: bool) -> Tensor:
    """R = G P (m x r) or P^T G (r x n), fp32, for G in any float dtype and P in fp32."""
    if gradient.is_cuda and gradient.dtype == torch.bfloat16 and SUMS_WIDER:
        return _project_halves(gradient, basis, right)
    gradient = gradient.float()
    return gradient @ basis if right else basis.T @ gradient


def _project_halves(gradient: Tensor, basis: Tensor, right: bool) -> Tensor:
    """The same on matrix units: P is the sum of two bfloat16 matrices but for 2^-17 of it, products are summed in fp32,
    and no fp32 copy of the gradient is made."""
    rank, high = basis.shape[1], basis.to(torch.bfloat16)
    both = torch.cat([high, (basis - high.float()).to(torch.bfloat16)], dim=1)
    if right:
        parts = torch.mm(gradient, both, out_dtype=torch.float32)
        return parts[:, :rank] + parts[:, rank:]
    parts = torch.mm(both.T, gradient, out_dtype=torch.float32)
    return parts[:rank] + parts[rank:]


def project_product(left: Tensor, other: Tensor, basis: Tensor, right: bool) -> Tensor:
    """`project` of G = L^T R, fp32, for L of T x m and R of T x n, multiplied in the order that never makes G.

    What is rounded to 16 bits where L and R are is the T x r product instead of G.
    """
    if left.dtype == torch.float32:
        return left.T @ (other @ basis) if right else (left @ basis).T @ other
    if left.is_cuda and left.dtype == torch.bfloat16 and SUMS_WIDER:
        small = _project_halves(other if right else left, basis, True).to(torch.bfloat16)
        return torch.mm(*((left.T, small) if right else (small.T, other)), out_dtype=torch.float32)
    return project(left.T @ other, basis, right)


def is_cheaper_in_products(rows: int, cols: int, rank: int) -> bool:
    """Does `project_product` take fewer operations than the gradient's own product alone?"""
    return rank * (rows + cols) < rows * cols


def project_back(update: Tensor, basis: Tensor, right: bool) -> Tensor:
    """R P^T or P R: m x n again."""
    return update @ basis.T if right else basis @ update


def add_projected_back(
    into: Tensor, update: Tensor, basis: Tensor, right: bool, *, beta: float = 1.0, alpha: float = 1.0
) -> None:
    """into <- beta * into + alpha * (R P^T or P R), in place and without that product as a tensor."""
    left, other = (update, basis.T) if right else (basis, update)
    into.addmm_(left, other, beta=beta, alpha=alpha)


def projected_shape(rows: int, cols: int, rank: int, larger: bool = False) -> tuple[int, int]:
    return (rows, rank) if projects_right(rows, cols, larger) else (rank, cols)


def basis_shape(rows: int, cols: int, rank: int, larger: bool = False) -> tuple[int, int]:
    return (cols if projects_right(rows, cols, larger) else rows, rank)


def find_basis(
    gradient: Tensor,
    rank: int,
    *,
    generator: torch.Generator,
    start: Tensor | None = None,
    iterations: int = 3,
    larger: bool = False,
) -> Tensor:
    """Orthonormal basis (of `basis_shape`, fp32) of the gradient's leading singular subspace.

    `start` (an earlier basis) warms the search up; random columns are added to it. A rank-deficient or zero gradient
    still gets a full orthonormal basis, for its null directions carry no gradient. `rank` must be < min(m, n).
    generator: of any device; the one that lives on the gradient's costs the least.

    Raises: FloatingPointError when the gradient holds NaN or infinity.
    """
    rows, cols = gradient.shape
    tall = gradient.float() if projects_right(rows, cols, larger) else gradient.float().T
    if not all(torch.isfinite(extreme) for extreme in tall.aminmax()):
        raise FloatingPointError("gradient with NaN or infinity")
    side, width = tall.shape[1], rank + oversample(rank)
    if side <= 2 * width:
        return _leading(tall.T @ tall, rank)
    fresh = width if start is None else width - start.shape[1]
    sketch = torch.randn(side, fresh, generator=generator, device=generator.device, dtype=torch.float32).to(tall.device)
    sketch = sketch if start is None else torch.cat([start, sketch], dim=1)
    for _ in range(iterations):
        sketch = _orthonormal(tall.T @ (tall @ sketch))
    core = tall @ sketch
    return torch.linalg.qr(sketch @ _leading(core.T @ core, rank)).Q


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span. A GPU takes long over Householder's (1.1 ms at 4096 x 160 on an H100, 0.2 for
    Cholesky's in float64), so there Cholesky's comes first, where the columns are far enough from dependent."""
    if not columns.is_cuda:
        return torch.linalg.qr(columns).Q
    wide = columns.double()
    factor, failed = torch.linalg.cholesky_ex(wide.T @ wide)
    least, most = factor.diagonal().aminmax()
    if not bool((failed == 0) & (least > DEPENDENT * most)):
        return torch.linalg.qr(columns).Q
    return torch.linalg.solve_triangular(factor, wide.T, upper=False).T.float()


def _leading(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the `rank` largest eigenvalues, largest first."""
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).contiguous()


def rotate_moments(mean: Tensor, square: Tensor, old: Tensor, new: Tensor, right: bool) -> tuple[Tensor, Tensor]:
    """Express Adam's moments in a new basis: with Q = P_old^T P_new, m' = m Q and v' = v (Q * Q).

    The mean is a vector in the projected space and rotates exactly (what lies outside the new basis is lost). The
    second moment rotates as the diagonal of a covariance whose coordinates are taken as uncorrelated, which keeps it
    non-negative. Ours; the published method keeps both as they are although their axes have changed.
    """
    turn = old.T @ new
    if right:
        return mean @ turn, square @ turn.square()
    return turn.T @ mean, turn.square().T @ square

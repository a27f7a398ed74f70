"""A weight as a matrix product operator (MPO): shapes, decomposition, the rebuilt weight, and a linear layer.

W (m x n) with m = o_1..o_N and n = i_1..i_N is a chain of cores C_k (r_{k-1} x o_k x i_k x r_k), r_0 = r_N = 1:
W[(o_1..o_N), (i_1..i_N)] = C_1[:, o_1, i_1, :] ... C_N[:, o_N, i_N, :].

Reference: DoTA (arXiv 2412.20891); Oseledets 2011, "Tensor-Train Decomposition", algorithm 1 (TT-SVD: one sweep, each
step truncated, squared error at most the sum of the discarded singular values squared). Deviation: the paper does not
give the factorisation of the sides, the padding or the gauges, so they are defined here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

UNBALANCED = 16  # with a factor this many times the ideal one, the side is padded instead


@dataclass(frozen=True, kw_only=True)
class MpoShape:
    """Shape of the MPO of a weight.

    Attributes:
        rows: Outputs m of the weight.
        cols: Inputs n of the weight.
        out: Factors o_1 .. o_N of the (padded) outputs.
        into: Factors i_1 .. i_N of the (padded) inputs.
        bonds: Inner bonds r_1 .. r_{N-1}.
    """

    rows: int
    cols: int
    out: tuple[int, ...]
    into: tuple[int, ...]
    bonds: tuple[int, ...]

    @property
    def cores(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shape (r_{k-1}, o_k, i_k, r_k) of each core."""
        left, right = (1, *self.bonds), (*self.bonds, 1)
        return tuple(zip(left, self.out, self.into, right, strict=True))

    @property
    def parameters(self) -> int:
        """Entries of all cores."""
        return sum(math.prod(core) for core in self.cores)

    @property
    def padded(self) -> tuple[int, int]:
        """(outputs, inputs) with padding."""
        return math.prod(self.out), math.prod(self.into)


# -- shapes ------------------------------------------------------------------------------------------------------------


def make_shape(
    rows: int, cols: int, num_cores: int, bond: int, factors: Mapping[int, Sequence[int]] | None = None
) -> MpoShape:
    """The shape of an MPO of a weight.

    Args:
        rows: Outputs of the weight.
        cols: Inputs of the weight.
        num_cores: Number N of cores, at least 1.
        bond: Largest inner bond, at least 1; bonds beyond the exact ones are reduced to those.
        factors: Factors by side, for sides that are not to be split by `balanced_factors`.

    Raises:
        ValueError: There is less than one core, the bond is below 1, or the factors are too few or too small.
    """
    if num_cores < 1 or bond < 1:
        raise ValueError(f"num_cores={num_cores}, bond={bond}: expected both to be at least 1")
    out, into = (_factors_of(side, num_cores, (factors or {}).get(side)) for side in (rows, cols))
    sizes = [o * i for o, i in zip(out, into, strict=True)]
    exact = [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, num_cores)]
    return MpoShape(rows=rows, cols=cols, out=out, into=into, bonds=tuple(min(bond, r) for r in exact))


def largest_bond(
    sides: Sequence[tuple[int, int]], num_cores: int, budget: int, factors: Mapping[int, Sequence[int]] | None = None
) -> int:
    """The largest bond, at least 1, with which the MPOs of these weights have at most `budget` parameters together.

    Args:
        sides: (outputs, inputs) of each weight.
        num_cores: Number of cores, as in `make_shape`.
        budget: Number of parameters.
        factors: Factors by side, as in `make_shape`.
    """

    def parameters(bond: int) -> int:
        return sum(make_shape(m, n, num_cores, bond, factors).parameters for m, n in sides)

    low, high = 1, 2
    limit = max(m * n for m, n in sides)
    while parameters(high) <= budget and high < limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(middle) <= budget else (low, middle)
    return low


def _factors_of(side: int, num_cores: int, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        return balanced_factors(side, num_cores)
    if len(given) != num_cores or math.prod(given) < side or min(given) < 1:
        raise ValueError(f"factors {list(given)} of a side of {side}: expected {num_cores} with a product >= {side}")
    return tuple(int(f) for f in given)


@lru_cache(maxsize=256)
def balanced_factors(side: int, num_cores: int) -> tuple[int, ...]:
    """The most equal factors of a side, or of the next larger number with nearly equal factors if it has none.

    Args:
        side: Outputs or inputs of a weight.
        num_cores: Number of factors.

    Returns:
        The factors, the largest first and odd primes last: at the end, a prime far above the others touches only one
        bond.
    """
    best = _most_equal(side, num_cores)
    if max(best) > UNBALANCED * side ** (1 / num_cores):
        padded = side
        while max(best) > 2 * padded ** (1 / num_cores):
            padded += 1
            best = _most_equal(padded, num_cores)
    plain = sorted((f for f in best if not _odd_prime(f)), reverse=True)
    return tuple(plain + sorted((f for f in best if _odd_prime(f)), reverse=True))


def _most_equal(number: int, count: int) -> tuple[int, ...]:
    ideal = math.log(number) / count
    choices = _splits(number, count, 1)
    return min(choices, key=lambda split: (round(sum((math.log(f) - ideal) ** 2 for f in split), 9), split))


def _splits(number: int, count: int, smallest: int) -> list[tuple[int, ...]]:
    """All ways to write `number` as `count` ascending factors of at least `smallest`."""
    if count == 1:
        return [(number,)] if number >= smallest else []
    found = []
    for factor in range(smallest, number + 1):
        if factor**count > number:
            break
        if number % factor == 0:
            found += [(factor, *rest) for rest in _splits(number // factor, count - 1, factor)]
    return found


def _odd_prime(number: int) -> bool:
    return number > 2 and all(number % d for d in range(2, math.isqrt(number) + 1))


# -- decomposition -----------------------------------------------------------------------------------------------------


def decompose(weight: Tensor, shape: MpoShape, gauge: str = "equal") -> list[Tensor]:
    """Cores of a weight by TT-SVD, truncated to the bonds within the sweep; they are exact at full bonds.

    Args:
        weight: The weight (m x n), of any float dtype.
        shape: Shape of the MPO.
        gauge: How the singular values are distributed over the cores; the product is the same. With "left" all cores
            but the last are orthonormal, with "balanced" both sides of a bond share its singular values, and with
            "equal" all cores have the same Frobenius norm, which suits a single learning rate.

    Returns:
        The cores, fp64.

    Raises:
        ValueError: The gauge is unknown.
        FloatingPointError: The weight holds NaN or infinity.
    """
    if gauge not in GAUGES:
        raise ValueError(f"gauge={gauge!r}: expected one of {', '.join(GAUGES)}")
    rest = _interleaved(weight.detach().double(), shape)
    if not torch.isfinite(rest).all():
        raise FloatingPointError("weight with NaN or infinity")
    cores, strengths = [], []
    for left, o, i, right in shape.cores[:-1]:
        rest = rest.reshape(left * o * i, -1)
        basis, values = _leading_left(rest, right)
        cores.append(basis.reshape(left, o, i, right))
        strengths.append(values)
        rest = basis.T @ rest
    cores.append(rest.reshape(shape.cores[-1]))
    return GAUGES[gauge](cores, strengths)


def _leading_left(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal left singular vectors of the `rank` largest singular values, and these values, largest first.

    They come from the Gram matrix (fp64) of the smaller side, after a QR when the matrix is tall, so that there is no
    division by a singular value.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    outer, core = torch.linalg.qr(matrix) if tall else (None, matrix)
    values, vectors = torch.linalg.eigh(core @ core.T)
    leading = vectors[:, -rank:].flip(1)
    strengths = values[-rank:].flip(0).clamp_min(0).sqrt()
    return (leading if outer is None else outer @ leading), strengths


def _as_they_are(cores: list[Tensor], strengths: list[Tensor]) -> list[Tensor]:
    return cores


def _balanced(cores: list[Tensor], strengths: list[Tensor]) -> list[Tensor]:
    """sqrt(S) on both sides of each bond; a vanishing singular value stays in the right core."""
    cores = list(cores)
    for k, values in enumerate(strengths):
        tiny = values <= 1e-12 * values.max().clamp_min(1e-300)
        root = torch.where(tiny, torch.ones_like(values), values.sqrt())
        cores[k] = cores[k] * root
        cores[k + 1] = cores[k + 1] / root[:, None, None, None]
    return cores


def _equal(cores: list[Tensor], strengths: list[Tensor]) -> list[Tensor]:
    """The cores times scalars of product 1 that give every core the same Frobenius norm."""
    norms = torch.stack([torch.linalg.vector_norm(core) for core in cores])
    if float(norms.min()) == 0.0:
        return cores
    common = norms.log().mean().exp()
    return [core * (common / norm) for core, norm in zip(cores, norms, strict=True)]


GAUGES = {"equal": _equal, "balanced": _balanced, "left": _as_they_are}


def random_cores(shape: MpoShape, norm: float, generator: torch.Generator) -> list[Tensor]:
    """Gaussian cores (fp64) of equal expected norms whose product has the expected Frobenius norm `norm`."""
    # E||W||^2 = m n prod(r_k) prod(s_k^2) over inner bonds, with entries of standard deviation s_k.
    entries = math.prod(shape.padded) * math.prod(shape.bonds)
    draws = [torch.randn(core, generator=generator, dtype=torch.float64) for core in shape.cores]
    sizes = [math.sqrt(draw.numel()) for draw in draws]
    common = (norm / math.sqrt(entries) * math.prod(sizes)) ** (1 / len(draws))
    return [draw * (common / size) for draw, size in zip(draws, sizes, strict=True)]


def _interleaved(weight: Tensor, shape: MpoShape) -> Tensor:
    """The padded weight with its indexes ordered (o_1, i_1, o_2, i_2, ...)."""
    rows, cols = shape.padded
    padded = torch.nn.functional.pad(weight, (0, cols - shape.cols, 0, rows - shape.rows))
    count = len(shape.out)
    order = [axis for k in range(count) for axis in (k, count + k)]
    return padded.reshape(*shape.out, *shape.into).permute(order)


def rebuild(cores: Sequence[Tensor], shape: MpoShape) -> Tensor:
    """W (rows x cols) from its cores, in their dtype; differentiable."""
    product = cores[0].reshape(shape.out[0], shape.into[0], -1)  # (o, i, r)
    for core in cores[1:]:
        (left_o, left_i, bond), (_, o, i, right) = product.shape, core.shape
        product = (product.reshape(-1, bond) @ core.reshape(bond, -1)).reshape(left_o, left_i, o, i, right)
        product = product.permute(0, 2, 1, 3, 4).reshape(left_o * o, left_i * i, right)
    return product.reshape(shape.padded)[: shape.rows, : shape.cols]


# -- the layer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Term:
    """One MPO in an effective weight: sign * MPO(cores), with a sign of 1 or -1."""

    shape: MpoShape
    sign: int


def add_terms(base: Tensor | None, terms: Sequence[Term], cores: Sequence[Tensor]) -> Tensor:
    """base + the sum of the terms, summed in the cores' dtype (fp32) and rounded once to the base's dtype.

    Args:
        base: The base weight (m x n); None stands for zero.
        terms: The MPOs to add, at least one. Terms that cancel leave exactly the base.
        cores: The cores of all terms, one term after another.
    """
    total: Tensor | None = None
    start = 0
    for term in terms:
        part = rebuild(cores[start : start + len(term.shape.out)], term.shape)
        start += len(term.shape.out)
        if total is None:
            # The part of a single core is a view of the core, which must not be added to.
            total = -part if term.sign < 0 else part.clone() if len(term.shape.out) == 1 else part
        else:
            total = total.add_(part, alpha=term.sign)
    assert total is not None, "add_terms needs at least one term"
    if base is None:
        return total
    wide = total.to(torch.promote_types(total.dtype, base.dtype))
    return wide.add_(base).to(base.dtype)


class DenseLayer(Protocol):
    """A linear layer whose weight is an argument instead of a parameter."""

    def kept_weight(self) -> Tensor | None:
        """The tensor that autograd saves so that backward can get the base weight; None without one."""

    def base_weight(self, kept: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The base weight (m x n) from the saved tensor; a quantised base is dequantised to `dtype`."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's output with this weight (m x n) instead of its own."""


def mpo_linear(
    x: Tensor, layer: DenseLayer, terms: Sequence[Term], cores: Sequence[Tensor], bias: Tensor | None = None
) -> Tensor:
    """layer.product(x, W) with W = base + terms, which is rebuilt in backward instead of saved.

    x, the base weight (no copy) and the cores are saved for backward with `save_for_backward`.

    Args:
        x: Input, (..., n).
        layer: The layer that holds the base weight.
        terms: The MPOs that are added to the base weight.
        cores: The cores of all terms, one term after another.
        bias: The bias that `layer.product` adds, or None; it is only here to get its gradient.

    Returns:
        The layer's output, (..., m).
    """
    return _MpoLinear.apply(x, layer.kept_weight(), bias, layer, tuple(terms), *cores)


class _MpoLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor | None,
        bias: Tensor | None,
        layer: DenseLayer,
        terms: tuple[Term, ...],
        *cores: Tensor,
    ) -> Tensor:
        y: Tensor = layer.product(x, add_terms(layer.base_weight(kept, x.dtype), terms, cores))
        ctx.save_for_backward(x if any(ctx.needs_input_grad[5:]) else None, kept, *cores)
        ctx.layer, ctx.terms, ctx.x_like = layer, terms, (x.shape, x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, *cores = ctx.saved_tensors
        shape, dtype = ctx.x_like
        g = incoming.reshape(-1, incoming.shape[-1])
        gx, gb = None, g.sum(0) if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[0]:
            weight = add_terms(ctx.layer.base_weight(kept, g.dtype), ctx.terms, cores)
            gx = (g @ weight.to(g.dtype)).view(shape).to(dtype)
            del weight
        if x is None:
            return gx, None, gb, None, None, *(None for _ in cores)
        gW = g.T @ x.reshape(-1, shape[-1]).to(g.dtype)
        found = _core_gradients(gW, ctx.terms, cores, ctx.needs_input_grad[5:])
        return gx, None, gb, None, None, *found


def _core_gradients(
    gW: Tensor, terms: Sequence[Term], cores: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the cores from that of the weight; None for a core that needs none."""
    found: list[Tensor | None] = []
    start = 0
    for term in terms:
        stop = start + len(term.shape.out)
        wanted = needed[start:stop]
        if any(wanted):
            with torch.enable_grad():
                pairs = zip(cores[start:stop], wanted, strict=True)
                leaves = [core.detach().requires_grad_(want) for core, want in pairs]
                product = rebuild(leaves, term.shape)
                signed = gW.to(product.dtype) if term.sign > 0 else -gW.to(product.dtype)
                grads = iter(torch.autograd.grad(product, [leaf for leaf in leaves if leaf.requires_grad], signed))
            found += [next(grads) if want else None for want in wanted]
        else:
            found += [None] * (stop - start)
        start = stop
    return found

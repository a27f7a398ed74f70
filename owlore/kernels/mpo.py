"""A weight as a matrix product operator: shapes, the decomposition, the rebuilt weight, and a layer that keeps neither.

W (m x n) with m = o_1..o_N and n = i_1..i_N is a chain of cores C_k (r_{k-1} x o_k x i_k x r_k), r_0 = r_N = 1:
W[(o_1..o_N), (i_1..i_N)] = C_1[:, o_1, i_1, :] ... C_N[:, o_N, i_N, :].

Reference: DoTA (arXiv 2412.20891); Oseledets 2011, "Tensor-Train Decomposition", algorithm 1 (TT-SVD: one sweep, each
step truncated, squared error at most the sum of the discarded singular values squared). Ours, since the paper does not
give them: the factorisation of the sides, padding, gauges.
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

UNBALANCED = 16  # a factor this many times the ideal one: the side is padded instead


@dataclass(frozen=True, kw_only=True)
class MpoShape:
    """Sides of the weight, the factors of the (padded) sides, and the inner bonds r_1 .. r_{N-1}."""

    rows: int
    cols: int
    out: tuple[int, ...]
    into: tuple[int, ...]
    bonds: tuple[int, ...]

    @property
    def cores(self) -> tuple[tuple[int, int, int, int], ...]:
        left, right = (1, *self.bonds), (*self.bonds, 1)
        return tuple(zip(left, self.out, self.into, right, strict=True))

    @property
    def parameters(self) -> int:
        return sum(math.prod(core) for core in self.cores)

    @property
    def padded(self) -> tuple[int, int]:
        return math.prod(self.out), math.prod(self.into)


# -- shapes ------------------------------------------------------------------------------------------------------------


def make_shape(
    rows: int, cols: int, num_cores: int, bond: int, factors: Mapping[int, Sequence[int]] | None = None
) -> MpoShape:
    """The shape of an MPO of a rows x cols weight; `factors` names the factors of single sides.

    Raises: ValueError for fewer than one core or a bond below 1, or factors that are too few or too small.
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
    """The largest bond with which the MPOs of all these weights hold at most `budget` parameters, at least 1."""

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
    """The most equal factors of `side`, or of the next larger number that has equal ones when `side` has none.

    Largest first, odd primes last: a prime far above the others meets only one bond there.
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
    """Cores (fp64) of the weight by TT-SVD, truncated to the bonds within the sweep; exact at full bonds.

    gauge: "left" (cores but the last are orthonormal), "balanced" (the singular values of each bond shared by both
    sides) or "equal" (all cores of one Frobenius norm, which suits one learning rate); the product is the same.

    Raises: ValueError for an unknown gauge, FloatingPointError when the weight holds NaN or infinity.
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
    """Orthonormal left singular vectors of the `rank` largest singular values, and those; no value is divided by.

    Through the small side's Gram matrix (fp64), after a QR when the matrix is tall.
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
    """sqrt(S) on both sides of each bond; a vanishing singular value stays where it is."""
    cores = list(cores)
    for k, values in enumerate(strengths):
        tiny = values <= 1e-12 * values.max().clamp_min(1e-300)
        root = torch.where(tiny, torch.ones_like(values), values.sqrt())
        cores[k] = cores[k] * root
        cores[k + 1] = cores[k + 1] / root[:, None, None, None]
    return cores


def _equal(cores: list[Tensor], strengths: list[Tensor]) -> list[Tensor]:
    """Scalars of product 1 that give every core the same Frobenius norm."""
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
    whole = cores[0].reshape(shape.out[0], shape.into[0], -1)  # (o, i, r)
    for core in cores[1:]:
        (left_o, left_i, bond), (_, o, i, right) = whole.shape, core.shape
        whole = (whole.reshape(-1, bond) @ core.reshape(bond, -1)).reshape(left_o, left_i, o, i, right)
        whole = whole.permute(0, 2, 1, 3, 4).reshape(left_o * o, left_i * i, right)
    return whole.reshape(shape.padded)[: shape.rows, : shape.cols]


# -- the layer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Term:
    """One MPO in an effective weight: sign * MPO(cores)."""

    shape: MpoShape
    sign: int


def add_terms(base: Tensor | None, terms: Sequence[Term], cores: Sequence[Tensor]) -> Tensor:
    """base + sum of the terms, summed in the cores' dtype (fp32) and rounded once to the base's.

    Terms that cancel leave exactly the base; without a base it is zero. `cores` holds every term's, one after another.
    """
    total: Tensor | None = None
    start = 0
    for term in terms:
        part = rebuild(cores[start : start + len(term.shape.out)], term.shape)
        start += len(term.shape.out)
        if total is None:
            total = -part if term.sign < 0 else part.clone() if len(term.shape.out) == 1 else part  # one core: a view
        else:
            total = total.add_(part, alpha=term.sign)
    assert total is not None, "an effective weight without terms is the base itself"
    if base is None:
        return total
    wide = total.to(torch.promote_types(total.dtype, base.dtype))
    return wide.add_(base).to(base.dtype)


class DenseLayer(Protocol):
    """A linear map whose weight is not a parameter but an argument."""

    def kept_weight(self) -> Tensor | None:
        """The tensor that backward needs to see the base again and autograd shall keep; None when there is none."""

    def base_weight(self, kept: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The base weight (m x n) from what was saved; in `dtype` where it has none of its own."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The map's output with this weight (m x n) in place of its own."""


def mpo_linear(
    x: Tensor, layer: DenseLayer, terms: Sequence[Term], cores: Sequence[Tensor], bias: Tensor | None = None
) -> Tensor:
    """layer.product(x, W) with W = base + terms, which is rebuilt in backward instead of kept.

    Gradients go to x, the cores and the `bias` (which `layer` adds) where they require one; saved for backward are x,
    the base weight (no copy) and the cores, through the usual hooks.
    """
    result: Tensor = _MpoLinear.apply(x, layer.kept_weight(), bias, layer, tuple(terms), *cores)
    return result


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
    """Gradients of the cores that need them, from that of the weight."""
    found: list[Tensor | None] = []
    start = 0
    for term in terms:
        stop = start + len(term.shape.out)
        wanted = needed[start:stop]
        if any(wanted):
            with torch.enable_grad():
                pairs = zip(cores[start:stop], wanted, strict=True)
                leaves = [core.detach().requires_grad_(want) for core, want in pairs]
                whole = rebuild(leaves, term.shape)
                signed = gW.to(whole.dtype) if term.sign > 0 else -gW.to(whole.dtype)
                grads = iter(torch.autograd.grad(whole, [leaf for leaf in leaves if leaf.requires_grad], signed))
            found += [next(grads) if want else None for want in wanted]
        else:
            found += [None] * (stop - start)
        start = stop
    return found

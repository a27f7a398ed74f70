"""Which blocks SMT trains: the budget, the scores, and the map that comes of them.

Scores by gradient are streamed: every parameter is frozen, a probe on the output of each target sees the incoming
gradient g and the layer's input x in backward, forms that one matrix's gradient g^T x, averages its blocks into an
fp64 table and drops it. So no optimizer exists, no weight changes, quantised bases work, and the peak is the weights,
the activations and one matrix's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from owlore.adapters.smt_config import SmtConfig
from owlore.adapters.targets import Target, count_2d, dense_weight, find_targets
from owlore.kernels.block_scores import CRITERIA, block_means
from owlore.kernels.block_sparse import Cell, grid_of
from owlore.kernels.seeds import generator_for

BlockMap = dict[str, Any]
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many blocks are trained, and their side."""

    block_size: int
    blocks: int


def budget(model: nn.Module, config: SmtConfig) -> Budget:
    """int(density * entries of all 2-D parameters / block_size^2) blocks, at least one (arXiv 2405.15525, section 4).

    The side is halved while the budget would not hold a block per target matrix, or a block would cover every one of
    them. Only shapes are read.
    """
    targets = find_targets(model, config)
    share, side = config.density * count_2d(model), config.block_size
    largest = max(max(target.shape) for target in targets)
    while side > 1 and (int(share / side**2) < len(targets) or side > largest):
        side = -(-side // 2)
    cells = sum(high * wide for high, wide in (grid_of(t.shape, side) for t in targets))
    return Budget(block_size=side, blocks=min(max(1, int(share / side**2)), cells))


def make_map(model: nn.Module, config: SmtConfig) -> BlockMap:
    """The block map of a selection that needs no data.

    Raises: ValueError for selection "gradient".
    """
    if config.selection not in _BY_SHAPE_OR_WEIGHT:
        raise ValueError(
            f'selection="{config.selection}" needs block_map=owlore.adapters.select_blocks(model, batches, config)'
        )
    targets, chosen = find_targets(model, config), budget(model, config)
    cells = _BY_SHAPE_OR_WEIGHT[config.selection](targets, chosen, config)
    return _as_map(targets, chosen.block_size, cells)


def select_blocks(model: nn.Module, batches: Iterable[Any], config: SmtConfig, *, loss: Loss | None = None) -> BlockMap:
    """The block map by gradient: a frozen warm-up over `batches`, then the best blocks within the budget.

    A batch is what `loss(model, batch)` takes; without `loss` it is a mapping of the model's arguments with labels.
    Weights, `requires_grad` flags and gradients are left as they were.

    Raises: ValueError without batches, FloatingPointError when a score is NaN or infinite.
    """
    targets, chosen = find_targets(model, config), budget(model, config)
    scores = score_blocks(model, batches, config, chosen.block_size, loss=loss)
    return _as_map(targets, chosen.block_size, best_cells(scores, chosen.blocks, config.allotment or "global"))


def score_blocks(
    model: nn.Module, batches: Iterable[Any], config: SmtConfig, block_size: int, *, loss: Loss | None = None
) -> dict[str, Tensor]:
    """Score of every block of every target, (blocks high, blocks wide) in fp64, averaged over the batches."""
    loss = loss or _own_loss
    criterion, targets = CRITERIA[config.criterion], find_targets(model, config)
    totals = {t.name: torch.zeros(grid_of(t.shape, block_size), dtype=torch.float64) for t in targets}

    def receive(name: str, gradient: Tensor) -> None:
        totals[name] += block_means(criterion.prepare(gradient), block_size).cpu()

    count = 0
    with _frozen(model), _probes(targets, receive), torch.enable_grad():
        for batch in batches:
            loss(model, batch).backward()
            count += 1
    if not count:
        raise ValueError("got no batches, expected at least one to score gradients with")
    scores = {name: criterion.finish(total / count) for name, total in totals.items()}
    bad = [name for name, score in scores.items() if not torch.isfinite(score).all()]
    if bad:
        raise FloatingPointError(f"gradient of {bad[0]} with NaN or infinity during block selection")
    return scores


# -- choosing ----------------------------------------------------------------------------------------------------


def best_cells(scores: dict[str, Tensor], blocks: int, allotment: str) -> dict[str, list[Cell]]:
    """Exactly `blocks` cells with the highest scores; ties go to the earlier matrix, then row, then column."""
    if allotment == "per_matrix":
        counts = allot(blocks, [score.numel() for score in scores.values()])
        pairs = zip(scores.items(), counts, strict=True)
        return {name: _top({name: score}, count).get(name, []) for (name, score), count in pairs}
    return _top(scores, blocks)


def _top(scores: dict[str, Tensor], count: int) -> dict[str, list[Cell]]:
    flat = torch.cat([score.flatten() for score in scores.values()])
    order = torch.argsort(flat, descending=True, stable=True)[:count].tolist()
    owners = [(name, score.shape[1], index) for name, score in scores.items() for index in range(score.numel())]
    found: dict[str, list[Cell]] = {}
    for position in order:
        name, wide, index = owners[position]
        found.setdefault(name, []).append(divmod(index, wide))
    return found


def allot(blocks: int, capacities: list[int]) -> list[int]:
    """Split `blocks` evenly over matrices that can take so many each; the remainder is spread over the list."""
    counts = [0] * len(capacities)
    left = min(blocks, sum(capacities))
    while left:
        room = [k for k, capacity in enumerate(capacities) if counts[k] < capacity]
        shares = [(t + 1) * left // len(room) - t * left // len(room) for t in range(len(room))]
        for k, share in zip(room, shares, strict=True):
            counts[k] += min(share, capacities[k] - counts[k])
        left = min(blocks, sum(capacities)) - sum(counts)
    return counts


def diagonal_cells(grid: Cell, count: int) -> list[Cell]:
    """`count` cells on the diagonal, evenly spread; beyond it on the diagonals shifted by 1, 2, ... columns."""
    high, wide = grid
    length = max(high, wide)
    found: dict[Cell, None] = {}
    for shift in range(wide if high >= wide else high):
        line = [(t * high // length, (t * wide // length)) for t in range(length)]
        line = [((i + shift) % high, j) if high < wide else (i, (j + shift) % wide) for i, j in line]
        fresh = [cell for cell in dict.fromkeys(line) if cell not in found]
        wanted = min(count - len(found), len(fresh))
        found |= dict.fromkeys(fresh[(2 * t + 1) * len(fresh) // (2 * wanted)] for t in range(wanted))
        if len(found) == count:
            break
    return list(found)


def _diagonal(targets: list[Target], chosen: Budget, config: SmtConfig) -> dict[str, list[Cell]]:
    grids = [grid_of(target.shape, chosen.block_size) for target in targets]
    counts = allot(chosen.blocks, [high * wide for high, wide in grids])
    return {t.name: diagonal_cells(grid, k) for t, grid, k in zip(targets, grids, counts, strict=True)}


def _random(targets: list[Target], chosen: Budget, config: SmtConfig) -> dict[str, list[Cell]]:
    stream = generator_for(config.seed, "smt-random")
    grids = {target.name: grid_of(target.shape, chosen.block_size) for target in targets}
    scores = {name: torch.rand(grid, generator=stream, dtype=torch.float64) for name, grid in grids.items()}
    return best_cells(scores, chosen.blocks, config.allotment or "global")


def _magnitude(targets: list[Target], chosen: Budget, config: SmtConfig) -> dict[str, list[Cell]]:
    scores = {t.name: block_means(dense_weight(t.module).abs(), chosen.block_size).cpu() for t in targets}
    return best_cells(scores, chosen.blocks, config.allotment or "global")


_BY_SHAPE_OR_WEIGHT = {"diagonal": _diagonal, "random": _random, "magnitude": _magnitude}


def _as_map(targets: list[Target], block_size: int, cells: dict[str, list[Cell]]) -> BlockMap:
    blocks = {t.name: [list(cell) for cell in sorted(cells[t.name])] for t in targets if cells.get(t.name)}
    return {"block_size": block_size, "blocks": blocks}


# -- watching gradients -------------------------------------------------------------------------------------------


class _Probe(torch.autograd.Function):
    """The identity on a layer's output; in backward it gives away the gradient of the layer's weight."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        ctx.receive(flat.T @ x.reshape(-1, x.shape[-1]).to(g.dtype))
        return (g if ctx.needs_input_grad[0] else None), None, None, None


@contextmanager
def _probes(targets: list[Target], receive: Callable[[str, Tensor], None]) -> Any:
    """Probes on the targets' outputs; the graph begins at the first of them, so nothing below is walked."""
    anchor = torch.zeros((), requires_grad=True)

    def hook(name: str) -> Any:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            x = (*inputs, *named.values())[0]
            found: Tensor = _Probe.apply(output, x, anchor, lambda gradient: receive(name, gradient))
            return found

        return forward

    handles = [target.module.register_forward_hook(hook(target.name), with_kwargs=True) for target in targets]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Any:
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    device = next(model.parameters()).device
    loss: Tensor = model(**{name: value.to(device) for name, value in batch.items()}).loss
    return loss

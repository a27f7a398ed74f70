"""The blocks that SMT trains: the budget, the scores, and the block map.

For scores by gradient every parameter is frozen. In backward, a probe on the output of each target has the incoming
gradient g and the layer's input x; it computes the gradient g^T x of that matrix and adds the means of its blocks to an
fp64 table. So there is no optimizer, no weight changes, a base may be quantised, and the peak memory is that of the
weights, the activations and one matrix's gradient.
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
    """How many blocks are trained.

    Attributes:
        block_size: Side of a block.
        blocks: Number of blocks in all matrices together.
    """

    block_size: int
    blocks: int


def budget(model: nn.Module, config: SmtConfig) -> Budget:
    """int(density * entries of all 2-D parameters / block_size^2) blocks, at least one (arXiv 2405.15525, section 4).

    Note: the side is halved while the budget has less than one block per target matrix, or a block is larger than every
    one of them.

    Args:
        model: The model; only its shapes are read.
        config: The configuration, with its density and block_size.
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

    Raises:
        ValueError: The selection is "gradient".
    """
    if config.selection not in _BY_SHAPE_OR_WEIGHT:
        raise ValueError(
            f'selection="{config.selection}" needs block_map=owlore.adapters.select_blocks(model, batches, config)'
        )
    targets, chosen = find_targets(model, config), budget(model, config)
    cells = _BY_SHAPE_OR_WEIGHT[config.selection](targets, chosen, config)
    return _as_map(targets, chosen.block_size, cells)


def select_blocks(model: nn.Module, batches: Iterable[Any], config: SmtConfig, *, loss: Loss | None = None) -> BlockMap:
    """The block map of selection "gradient": a frozen warm-up over the batches, then the blocks with the best scores.

    Weights, `requires_grad` flags and gradients of the model do not change.

    Args:
        model: The model without the adapter.
        batches: What `loss` takes; without `loss`, mappings of the model's arguments with labels.
        config: The configuration: targets, block_size, density, criterion and allotment are read.
        loss: Computes the loss of a batch, as `loss(model, batch)`; None takes the model's loss.

    Returns:
        {"block_size": l, "blocks": {module name: [[i, j], ...]}}, for `SmtConfig.block_map`.

    Raises:
        ValueError: There are no batches, or nothing matches target_modules.
        FloatingPointError: A score is NaN or infinite.
    """
    targets, chosen = find_targets(model, config), budget(model, config)
    scores = score_blocks(model, batches, config, chosen.block_size, loss=loss)
    return _as_map(targets, chosen.block_size, best_cells(scores, chosen.blocks, config.allotment or "global"))


def score_blocks(
    model: nn.Module, batches: Iterable[Any], config: SmtConfig, block_size: int, *, loss: Loss | None = None
) -> dict[str, Tensor]:
    """Scores of the blocks of every target by its name, averaged over the batches: fp64, of the shape of `grid_of`."""
    loss = loss or _model_loss
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
    """The cells with the highest scores; ties go to the earlier matrix, then row, then column.

    Args:
        scores: Scores of the blocks of each matrix.
        blocks: Number of cells to choose.
        allotment: "global" or "per_matrix".
    """
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
    """Split a number of blocks evenly over the matrices, none above its capacity; a remainder is spread evenly."""
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
    """`count` cells spread evenly on the diagonal; once it is full, on the diagonals shifted by 1, 2, ... columns."""
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
    """The identity on a layer's output; in backward it passes the gradient of the layer's weight to a callback."""

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
    """Probes on the targets' outputs; the graph begins at the first of them, so that backward ends there."""
    anchor = torch.zeros((), requires_grad=True)

    def hook(name: str) -> Any:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            x = (*inputs, *named.values())[0]
            return _Probe.apply(output, x, anchor, lambda gradient: receive(name, gradient))

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


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    device = next(model.parameters()).device
    return model(**{name: value.to(device) for name, value in batch.items()}).loss

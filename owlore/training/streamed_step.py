"""A step that walks the stack once for all its micro-batches.

Every block is held once upwards and once downwards and sees all micro-batches while it is there, so what a step loads
does not depend on `--accum`: micro-batches are row chunks that cost no traffic. Backward is a loop over blocks, not one
autograd graph: a block recomputes from its boundary and gives its input gradient while it is held, and the graph of it
is gone before its weights are.

The arithmetic is that of the usual loop, operation by operation: each micro-batch meets the same shapes and random
numbers, and gradients arrive at a parameter in the order of the micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from owlore.data.batches import MicroBatch
from owlore.kernels.seeds import seed_for
from owlore.optim import RotatingOptimizer
from owlore.residency.block_chain import Arguments, BlockChain
from owlore.residency.boundaries import Boundaries
from owlore.residency.host_embedding import HostEmbedding
from owlore.residency.residency import Residency
from owlore.residency.visits import step_visits
from owlore.training.loss import CausalLoss

EVAL_GROUP = 16  # micro-batches that one walk of an evaluation serves


@dataclass
class _Rows:
    """One micro-batch on its way: the hidden state where it is, its gradient on the way back, its random numbers."""

    inputs: dict[str, Tensor]
    num_trained: int
    hidden: Tensor
    arguments: tuple[Arguments, ...]
    random: RandomNumbers
    entry: Tensor | None = None  # what entered the first block, with its graph, where the embeddings are trained
    before: dict[int, Tensor] = field(default_factory=dict)  # random state before each block that is recomputed
    gradient: Tensor | None = None
    waiting: list[Tensor | None] = field(default_factory=list)  # of the parameters that `aim` holds


class StreamedStep:
    """Forward and backward of a step, block by block."""

    def __init__(
        self,
        loss: CausalLoss,
        optimizer: RotatingOptimizer,
        residency: Residency,
        chain: BlockChain,
        boundaries: Boundaries,
        embedding: HostEmbedding | None = None,
    ) -> None:
        self.loss, self.optimizer, self.residency = loss, optimizer, residency
        self.chain, self.boundaries, self.embedding = chain, boundaries, embedding
        self.lowest = 0  # block that backward has to reach; the number of blocks where it has to reach none
        self.bottom = False  # backward goes on into the embeddings
        self.held: tuple[nn.Parameter, ...] = ()

    def aim(self, lowest: int, *, bottom: bool = False, held: Sequence[nn.Parameter] = ()) -> None:
        """Backward reaches down to block `lowest` (the number of blocks: none), with `bottom` on into the embeddings.

        held: trained parameters outside the blocks whose gradients wait until the embeddings' arrive, because one of
        them (tied weights) gets a part from both ends and must see their sum.
        """
        self.lowest, self.bottom, self.held = (0 if bottom else lowest), bottom, tuple(held)

    def gather(self, batches: Mapping[int, MicroBatch], tokens: int, *, seed: int, step: int) -> Tensor:
        """Gradients of all micro-batches given to the optimizer; the loss of each, divided by `tokens`.

        batches: by their number in the step, from which each has its random numbers.
        """
        device = self.residency.copies.device
        last = len(batches) - 1
        self.residency.keeps_dense = len(batches) > 1
        try:
            self._plan()
            rows = [
                self._enter(batch, RandomNumbers(seed_for(seed, "dropout", step, index), device), grad=self.bottom)
                for index, batch in batches.items()
            ]
            self._forward(rows, keep=True)
            with self.residency.copies.span("loss"):
                losses = [self._turn(row, tokens, step, last=index == last) for index, row in enumerate(rows)]
            if any(row.gradient is not None for row in rows):
                self._backward(rows, step)
            return torch.stack(losses)
        finally:
            self.boundaries.clear()
            if self.embedding is not None:
                self.embedding.forget()

    def evaluate(self, batches: Iterable[MicroBatch]) -> Iterator[Tensor]:
        """Summed loss of each micro-batch, without gradients; a walk of the blocks serves a group of them."""
        group: list[MicroBatch] = []
        for batch in batches:
            group.append(batch)
            if len(group) == EVAL_GROUP:
                yield from self._losses(group)
                group = []
        if group:
            yield from self._losses(group)

    @torch.no_grad()
    def _losses(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        device = self.residency.copies.device
        self.residency.keeps_dense = len(batches) > 1
        rows = [self._enter(batch, RandomNumbers(0, device), grad=False) for batch in batches]
        self.residency.walk(range(len(self.chain)))
        self._forward(rows, keep=False)
        losses = [self._leave(row, row.hidden) for row in rows]
        if self.embedding is not None:
            self.embedding.forget()
        return losses

    # -- a walk ------------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Tell the loader this step's visits, and that another step of the same kind follows."""
        visits = [visit.block for visit in step_visits(len(self.chain), self.lowest)]
        self.residency.walk([*visits, *visits])

    def _enter(self, batch: MicroBatch, random: RandomNumbers, *, grad: bool) -> _Rows:
        inputs = batch.on(self.residency.copies.device)
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        if self.embedding is not None:
            self.embedding.knows(ids, batch.input_ids)
        with torch.set_grad_enabled(grad), random:
            entry = self.chain.capture(lambda: self.loss.outputs(ids, positions), entered=random.remember)
        hidden = entry.hidden.detach()
        return _Rows(inputs, batch.num_trained, hidden, entry.arguments, random, entry=entry.hidden if grad else None)

    def _forward(self, rows: Sequence[_Rows], *, keep: bool) -> None:
        self.boundaries.expect(
            [(b, m) for b in reversed(range(self.lowest, len(self.chain))) for m in range(len(rows))]
        )
        for block in range(len(self.chain)):
            with self.residency.visit(block), torch.no_grad():
                for index, row in enumerate(rows):
                    if keep and block >= self.lowest:
                        self.boundaries.keep((block, index), row.hidden)
                        row.before[block] = row.random.state
                    with row.random:
                        row.hidden = self.chain.call(block, row.hidden, row.arguments[block])

    def _turn(self, row: _Rows, tokens: int, step: int, *, last: bool) -> Tensor:
        """Loss of a micro-batch and, where anything is trained, the gradient of what left the last block."""
        top = row.hidden.detach().requires_grad_(self.lowest < len(self.chain) or self.bottom)
        resume = row.random.state

        def left() -> None:
            row.random.state = resume
            row.random.recall()

        with row.random:
            mean = self._leave(row, top, left) / tokens
        del row.hidden
        if mean.requires_grad:
            self.optimizer.micro_batch(step, last=last)
            scaled = mean * self.optimizer.grad_scale
            if self.held:
                row.gradient, *waiting = torch.autograd.grad(scaled, [top, *self.held], allow_unused=True)
                row.waiting = list(waiting)
            else:
                scaled.backward()
                row.gradient = top.grad
        return mean.detach()

    def _leave(self, row: _Rows, hidden: Tensor, left: Callable[[], None] = lambda: None) -> Tensor:
        """Loss of a micro-batch from what its last block gave."""
        with nullcontext() if self.embedding is None else self.embedding.idle():
            loss: Tensor = self.chain.inject(
                hidden, partial(self.loss, **row.inputs, num_trained=row.num_trained), left=left
            )
        return loss

    def _backward(self, rows: Sequence[_Rows], step: int) -> None:
        last = len(rows) - 1
        for block in reversed(range(self.lowest, len(self.chain))):
            with self.residency.visit(block):
                for index, row in enumerate(rows):
                    x = self.boundaries.take((block, index))
                    x.requires_grad_(block > self.lowest or self.bottom)
                    row.random.state = row.before.pop(block)
                    with torch.enable_grad(), row.random:
                        y = self.chain.call(block, x, row.arguments[block])
                    self.optimizer.micro_batch(step, last=index == last)
                    torch.autograd.backward(y, row.gradient)
                    row.gradient = x.grad
                    del x, y
        for index, row in enumerate(rows):
            if row.entry is not None and row.gradient is not None:
                self.optimizer.micro_batch(step, last=index == last)
                waiting = [(p, g) for p, g in zip(self.held, row.waiting, strict=False) if g is not None]
                row.waiting = []
                roots, gradients = zip((row.entry, row.gradient), *waiting, strict=True)
                torch.autograd.backward(roots, gradients)


class RandomNumbers:
    """torch's global generator as one micro-batch sees it: entering takes its state, leaving puts the world's back."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self.state = torch.Generator(device=device).manual_seed(seed).get_state()
        self._world: Tensor | None = None
        self._remembered: Tensor | None = None

    def __enter__(self) -> None:
        self._world = self._get()
        self._set(self.state)

    def __exit__(self, *exception: object) -> None:
        self.state = self._get() if self._remembered is None else self._remembered
        self._remembered = None
        assert self._world is not None
        self._set(self._world)

    def remember(self) -> None:
        """Called inside: the state to go on with is the present one, whatever is still drawn."""
        self._remembered = self._get()

    def recall(self) -> None:
        """Called inside: go on from `state`."""
        self._set(self.state)

    def _get(self) -> Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()

    def _set(self, state: Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)

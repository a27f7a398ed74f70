"""A training step that visits the blocks twice for all its micro-batches: once in forward, once in backward.

A block computes all micro-batches while it is held, so what a step loads does not depend on `--accum`. Backward is a
loop over blocks, not one autograd graph: a block is recomputed from its boundary and gives its input gradient while it
is held, and its graph is freed before its weights are.

The arithmetic is that of the usual loop, operation by operation: each micro-batch has the same shapes and random
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
from owlore.residency.block_chain import BlockArguments, BlockChain
from owlore.residency.boundaries import Boundaries
from owlore.residency.host_embedding import HostEmbedding
from owlore.residency.residency import Residency
from owlore.residency.visits import step_visits
from owlore.training.loss import CausalLoss

EVAL_GROUP = 16  # micro-batches of an evaluation that are computed together, for one visit of each block


@dataclass
class _MicroBatchState:
    """One micro-batch inside a step.

    Attributes:
        hidden: the present hidden state in forward.
        arguments: every block's arguments beside the hidden state.
        random: the generator's state of this micro-batch.
        embedded: what entered the first block, with its graph, where the embeddings are trained; else None.
        random_before: generator state before each block that is recomputed.
        gradient: the loss's gradient by the present hidden state in backward.
        deferred: gradients of `StreamedStep.deferred` from the loss.
    """

    inputs: dict[str, Tensor]
    num_trained: int
    hidden: Tensor
    arguments: tuple[BlockArguments, ...]
    random: RandomState
    embedded: Tensor | None = None
    random_before: dict[int, Tensor] = field(default_factory=dict)
    gradient: Tensor | None = None
    deferred: list[Tensor | None] = field(default_factory=list)


class StreamedStep:
    """Forward and backward of a step, block by block.

    Args:
        loss: gives the summed loss of a micro-batch.
        optimizer: takes each gradient in its hooks and frees it.
        residency: the blocks' weights.
        chain: the blocks' forwards.
        boundaries: the hidden states that backward starts from.
        embedding: the input embedding, where it stays on the host.

    Attributes:
        lowest: the lowest block that backward reaches; the number of blocks where it reaches none.
        trains_embeddings: whether backward goes on into the embeddings.
        deferred: parameters whose gradients wait for those of the embeddings.
    """

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
        self.lowest, self.trains_embeddings = 0, False
        self.deferred: tuple[nn.Parameter, ...] = ()

    def set_depth(self, lowest: int, *, trains_embeddings: bool = False, deferred: Sequence[nn.Parameter] = ()) -> None:
        """Set how far backward goes.

        Args:
            lowest: the lowest trained block; the number of blocks for none.
            trains_embeddings: whether backward goes through all blocks into the embeddings.
            deferred: trained parameters outside the blocks whose gradients wait until the embeddings' arrive, because
                one of them (tied weights) gets a part from both ends and the optimizer needs their sum.
        """
        self.lowest, self.trains_embeddings = (0 if trains_embeddings else lowest), trains_embeddings
        self.deferred = tuple(deferred)

    def gather(self, batches: Mapping[int, MicroBatch], tokens: int, *, seed: int, step: int) -> Tensor:
        """Give the optimizer the gradients of all micro-batches.

        Args:
            batches: at least one, by their index in the step, from which each has its random numbers.
            tokens: trained tokens of the whole step, by which each loss is divided.
            seed: seed of the run.
            step: global step, from 0.

        Returns:
            The share of each micro-batch in the mean loss.
        """
        last = len(batches) - 1
        self.residency.cache_dense = len(batches) > 1
        try:
            visits = step_visits(len(self.chain), self.lowest)
            self.residency.plan_visits([*visits, *visits])  # another step of the same kind follows
            states = [
                self._embed(batch, seed_for(seed, "dropout", step, index), grad=self.trains_embeddings)
                for index, batch in batches.items()
            ]
            self._forward(states, save=True)
            with self.residency.copy_queue.span("loss"):
                losses = [
                    self._loss_backward(state, tokens, step, last=index == last) for index, state in enumerate(states)
                ]
            if any(state.gradient is not None for state in states):
                self._backward(states, step)
            return torch.stack(losses)
        finally:
            self.boundaries.clear()
            if self.embedding is not None:
                self.embedding.clear_host_ids()

    def evaluate(self, batches: Iterable[MicroBatch]) -> Iterator[Tensor]:
        """Summed loss of each micro-batch, without gradients; one visit of a block serves a group of them."""
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
        self.residency.cache_dense = len(batches) > 1
        states = [self._embed(batch, 0, grad=False) for batch in batches]
        self.residency.plan_visits(range(len(self.chain)))
        self._forward(states, save=False)
        losses = [self._loss(state, state.hidden) for state in states]
        if self.embedding is not None:
            self.embedding.clear_host_ids()
        return losses

    def _embed(self, batch: MicroBatch, seed: int, *, grad: bool) -> _MicroBatchState:
        """Run the model up to its first block."""
        device = self.residency.copy_queue.device
        inputs, random = batch.on(device), RandomState(seed, device)
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        if self.embedding is not None:
            self.embedding.set_host_ids(ids, batch.input_ids)
        with torch.set_grad_enabled(grad), random:
            captured = self.chain.capture(lambda: self.loss.outputs(ids, positions), on_first=random.keep_present)
        return _MicroBatchState(
            inputs,
            batch.num_trained,
            captured.hidden.detach(),
            captured.arguments,
            random,
            embedded=captured.hidden if grad else None,
        )

    def _forward(self, states: Sequence[_MicroBatchState], *, save: bool) -> None:
        backward_order = reversed(range(self.lowest, len(self.chain)))
        self.boundaries.plan([(block, index) for block in backward_order for index in range(len(states))])
        for block in range(len(self.chain)):
            with self.residency.visit(block), torch.no_grad():
                for index, state in enumerate(states):
                    if save and block >= self.lowest:
                        self.boundaries.save((block, index), state.hidden)
                        state.random_before[block] = state.random.state
                    with state.random:
                        state.hidden = self.chain.call(block, state.hidden, state.arguments[block])

    def _loss_backward(self, state: _MicroBatchState, tokens: int, step: int, *, last: bool) -> Tensor:
        """Loss of a micro-batch and, where anything is trained, its gradient by what the last block gave."""
        top = state.hidden.detach().requires_grad_(self.lowest < len(self.chain) or self.trains_embeddings)
        with state.random:
            mean = self._loss(state, top, on_last=state.random.rewind) / tokens
        del state.hidden
        if mean.requires_grad:
            self.optimizer.micro_batch(step, last=last)
            scaled = mean * self.optimizer.grad_scale
            if self.deferred:
                state.gradient, *deferred = torch.autograd.grad(scaled, [top, *self.deferred], allow_unused=True)
                state.deferred = list(deferred)
            else:
                scaled.backward()
                state.gradient = top.grad
        return mean.detach()

    def _loss(self, state: _MicroBatchState, hidden: Tensor, on_last: Callable[[], None] = lambda: None) -> Tensor:
        """Loss of a micro-batch from what its last block gave."""
        with nullcontext() if self.embedding is None else self.embedding.give_zeros():
            loss: Tensor = self.chain.inject(
                hidden, partial(self.loss, **state.inputs, num_trained=state.num_trained), on_last=on_last
            )
        return loss

    def _backward(self, states: Sequence[_MicroBatchState], step: int) -> None:
        last = len(states) - 1
        for block in reversed(range(self.lowest, len(self.chain))):
            with self.residency.visit(block):
                for index, state in enumerate(states):
                    x = self.boundaries.pop((block, index))
                    x.requires_grad_(block > self.lowest or self.trains_embeddings)
                    state.random.state = state.random_before.pop(block)
                    with torch.enable_grad(), state.random:
                        y = self.chain.call(block, x, state.arguments[block])
                    self.optimizer.micro_batch(step, last=index == last)
                    torch.autograd.backward(y, state.gradient)
                    state.gradient = x.grad
                    del x, y
        for index, state in enumerate(states):
            if state.embedded is not None and state.gradient is not None:
                self.optimizer.micro_batch(step, last=index == last)
                deferred = [(p, g) for p, g in zip(self.deferred, state.deferred, strict=False) if g is not None]
                state.deferred = []
                roots, gradients = zip((state.embedded, state.gradient), *deferred, strict=True)
                torch.autograd.backward(roots, gradients)


class RandomState:
    """The random numbers of one micro-batch: inside the context, torch's global generator goes on from `state`.

    On leaving, `state` is where the micro-batch goes on, and the generator has the state from before the context.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self.state = torch.Generator(device=device).manual_seed(seed).get_state()
        self._outside: Tensor | None = None
        self._kept: Tensor | None = None

    def __enter__(self) -> None:
        self._outside = self._get()
        self._set(self.state)

    def __exit__(self, *exception: object) -> None:
        self.state = self._get() if self._kept is None else self._kept
        self._kept = None
        assert self._outside is not None
        self._set(self._outside)

    def keep_present(self) -> None:
        """Called inside: on leaving, `state` is the present one, whatever is drawn until then."""
        self._kept = self._get()

    def rewind(self) -> None:
        """Called inside: let the generator go on from `state` again."""
        self._set(self.state)

    def _get(self) -> Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()

    def _set(self, state: Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)

"""Activation checkpointing: which blocks backward reaches, the same gradients, and one buffer for what is kept."""

import pytest
import torch
from live_tensors import LiveTensors
from makers import tiny_llama

from owlore.activations.checkpointing import ActivationCheckpointing
from owlore.blocks import find_parts, freeze
from owlore.optim import RotatingOptimizer, UpdateSpec
from owlore.training.loss import CausalLoss


class ReachedBlocks:
    """The blocks that backward really reaches: each marks itself when a gradient arrives at its feed-forward output."""

    def __init__(self, blocks):
        self.seen = set()
        for index, block in enumerate(blocks):
            block.mlp.register_forward_hook(self._mark(index))

    def _mark(self, index):
        def hook(module, inputs, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: self.seen.add(index))

        return hook


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("active", "embeddings", "reached"), [
    ((6, 7), False, {6, 7}),
    ((4, 7), False, {4, 5, 6, 7}),
    ((0,), False, set(range(8))),
    ((6, 7), True, set(range(8))),
])  # fmt: skip
def test_backward_stops_at_the_lowest_trained_block(checkpointing, active, embeddings, reached):
    model = tiny_llama(blocks=8)
    freeze(model)
    parts = find_parts(model)
    optimizer = RotatingOptimizer(parts.parameters(range(8), parts.groups), seed=0)
    groups = ("embeddings",) if embeddings else ()
    optimizer.switch(dict.fromkeys(parts.parameters(active, groups), UpdateSpec()), 0)
    recompute = ActivationCheckpointing(parts.modules, enabled=checkpointing)
    recompute.lowest = 0 if embeddings else active[0]
    counter = ReachedBlocks(parts.modules)
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    CausalLoss(model)(ids, ids).backward()
    assert counter.seen == reached


@pytest.mark.parametrize("active", [(0, 5), (5,), (2, 3)])
def test_gradients_are_the_same_with_and_without_checkpointing(active):
    results = []
    for enabled in (False, True):
        model = tiny_llama(blocks=6)
        freeze(model)
        parts = find_parts(model)
        for parameter in parts.parameters(active, ()).values():
            parameter.requires_grad_(True)
        recompute = ActivationCheckpointing(parts.modules, enabled=enabled)
        recompute.lowest = active[0]
        ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
        CausalLoss(model)(ids, ids).backward()
        recompute.patches.close()
        assert all("forward" not in vars(block) for block in parts.modules)
        results.append({n: p.grad for n, p in parts.parameters(active, ()).items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_recomputation_keeps_one_buffer_and_no_hidden_state_beside_it():
    model = tiny_llama(blocks=8, width=32)
    freeze(model)
    parts = find_parts(model)
    for parameter in parts.parameters((2, 6), ()).values():
        parameter.requires_grad_(True)
    recompute = ActivationCheckpointing(parts.modules, enabled=True)
    recompute.lowest = 2
    ids = torch.randint(4, 60, (3, 13), generator=torch.Generator().manual_seed(0))
    loss = CausalLoss(model)
    hidden = torch.empty(3, 13, 32), torch.empty(6, 3, 13, 32)
    with LiveTensors(hidden) as watch:
        out = loss(ids, ids)
        # The input of the last norm, and the buffer of six blocks.
        assert sorted(watch.alive.values()) == [tensor.nbytes for tensor in hidden]
        out.backward()
    assert not watch.alive

"""The parts of a model: every parameter in exactly one place, by identity, in every family."""

import pytest
import torch
from makers import FAMILIES, tiny_llama, tiny_models
from torch import nn

from htsr.errors import BadInput
from owlore.blocks import find_parts, freeze


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_groups_are_the_whole_model(family):
    model = tiny_models()[family]()
    parts = find_parts(model)
    assert parts.num_blocks == 3
    inside = [name for block in parts.blocks for name, _ in block]
    assert len(inside) == len(set(inside))
    outside = set(parts.parameters((), parts.groups))
    assert set(inside).isdisjoint(outside)
    assert set(inside) | outside == {name for name, _ in model.named_parameters()}
    assert parts.groups["embeddings"] and parts.groups["head"] and parts.groups["norm"]


def test_tied_embeddings_and_head_name_one_parameter():
    parts = find_parts(tiny_llama(tied=True))
    assert parts.groups["embeddings"] == parts.groups["head"]
    assert len(parts.parameters((), ("embeddings", "head"))) == 1


def test_freezing_leaves_nothing_trainable():
    model = tiny_llama()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    freeze(model)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_a_model_without_a_stack_of_blocks_is_refused():
    with pytest.raises(BadInput):
        find_parts(nn.Linear(3, 3))


def test_blocks_that_share_a_parameter_are_refused():
    model = tiny_llama(blocks=3)
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(BadInput, match="share parameters"):
        find_parts(model)

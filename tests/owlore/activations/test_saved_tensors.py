"""Kept activations of frozen blocks lie in an arena: the same gradients, the same memory in every step."""

import pytest
import torch
from makers import tiny_llama, tiny_models

from owlore.activations.saved_tensors import saved_tensors_in_arena
from owlore.blocks import find_parts, freeze
from owlore.training.loss import CausalLoss


def trained(model, active):
    freeze(model)
    parts = find_parts(model)
    for parameter in parts.parameters(active, ()).values():
        parameter.requires_grad_(True)
    return parts, CausalLoss(model)


def some_ids(seed, shape=(2, 12)):
    return torch.randint(4, 30, shape, generator=torch.Generator().manual_seed(seed))


def gradients(parts, active):
    found = {name: parameter.grad for name, parameter in parts.parameters(active, ()).items()}
    for parameter in parts.parameters(active, ()).values():
        parameter.grad = None
    return found


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("family", sorted(tiny_models()))
def test_gradients_are_the_same_bit_for_bit_in_every_family(family):
    model = tiny_models()[family]()
    active = (0,)
    parts, loss = trained(model, active)
    torch.manual_seed(0)
    loss(some_ids(0), some_ids(0)).backward()
    expected = gradients(parts, active)
    with saved_tensors_in_arena(parts.modules, enabled=True) as arena:
        for _ in range(3):  # the first looks how large a buffer has to be
            torch.manual_seed(0)
            loss(some_ids(0), some_ids(0)).backward()
            assert_equal(expected, gradients(parts, active))
    assert arena.num_bytes() > 0


@pytest.mark.parametrize(("active", "frozen"), [((0, 5), 4), ((2, 3), 2), ((5,), 0)])
def test_a_buffer_for_each_frozen_block_above_the_lowest_trained_one_serves_all_steps(active, frozen):
    parts, loss = trained(tiny_llama(blocks=6), active)
    with saved_tensors_in_arena(parts.modules, enabled=True) as arena:
        for step in range(4):
            loss(some_ids(step), some_ids(step)).backward()
            if step > 0:
                assert arena.num_bytes() == frozen * arena.block_bytes
        assert not any(buffer.in_use for buffer in arena.buffers)
        with torch.no_grad():
            loss(some_ids(0), some_ids(0))
        assert not any(buffer.in_use for buffer in arena.buffers)
    assert all("forward" not in vars(block) for block in parts.modules)


def test_a_forward_before_the_last_one_went_back_gets_buffers_of_its_own():
    active = (1,)
    parts, loss = trained(tiny_llama(blocks=5), active)
    alone = []
    for seed in (1, 2):
        loss(some_ids(seed), some_ids(seed)).backward()
        alone.append(gradients(parts, active))
    with saved_tensors_in_arena(parts.modules, enabled=True) as arena:
        loss(some_ids(0), some_ids(0)).backward()
        gradients(parts, active)
        first, second = (loss(some_ids(seed), some_ids(seed)) for seed in (1, 2))
        assert sum(buffer.in_use for buffer in arena.buffers) == 6
        second.backward()
        assert_equal(alone[1], gradients(parts, active))
        first.backward()
        assert_equal(alone[0], gradients(parts, active))


def test_longer_rows_get_larger_buffers():
    active = (1,)
    parts, loss = trained(tiny_llama(blocks=4), active)
    with saved_tensors_in_arena(parts.modules, enabled=True) as arena:
        for shape in ((2, 12), (2, 12), (2, 30), (2, 30), (1, 5)):
            loss(some_ids(0, shape), some_ids(0, shape)).backward()
            found = gradients(parts, active)
        grown = arena.block_bytes
    assert arena.num_bytes() == 2 * grown
    loss(some_ids(0, (1, 5)), some_ids(0, (1, 5))).backward()
    assert_equal(gradients(parts, active), found)


class Doubles(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x):
        y = x * 2
        y = y * y  # saves y, whose memory a later tensor may get
        del x
        return y.sin() * y[:, ::2].repeat(1, 2)


def test_what_is_kept_is_in_the_buffer_and_a_storage_is_copied_once():
    block = Doubles()
    x = torch.rand(64, 64, requires_grad=True)
    expected = torch.autograd.grad(block(x).sum(), x)[0]
    with saved_tensors_in_arena([block], enabled=True) as arena:
        for _ in range(2):
            out = block(x)
            (found,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
            assert torch.equal(found, expected)
        begin = arena.buffers[0].memory.data_ptr()
        factor = out.grad_fn._saved_self
        assert begin <= factor.data_ptr() < begin + arena.block_bytes
    # x * 2, its square, the sine and the repeated half: four storages of 16 KiB.
    assert arena.block_bytes == 4 * 64 * 64 * 4


def test_a_storage_that_is_written_to_and_saved_again_is_copied_again():
    """h is saved, its result detached, h changed in place and saved anew: what autograd allows."""

    class InPlace(torch.nn.Module):
        def forward(self, h):
            h = h + 1
            _ = (h * h).mean().detach()
            h += 1
            return h * h

    block, x = InPlace(), torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def gradient():
        given = x.clone().requires_grad_()
        block(given).sum().backward()
        return given.grad

    expected = gradient()
    with saved_tensors_in_arena([block], enabled=True):
        assert all(torch.equal(gradient(), expected) for _ in range(3))

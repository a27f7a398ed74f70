"""The AdamW step: the formula, and torch's own optimizer."""

import paper
import pytest
import torch
from makers import generator

from owlore.kernels import adamw
from owlore.kernels.adamw import AdamW, adamw_update_, direction, update_moments


def trajectory(weight, gradients, lr, constants):
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    weight = weight.clone()
    for step, gradient in enumerate(gradients, start=1):
        update_moments(gradient, mean, square, constants)
        weight.mul_(1 - lr * constants.decay).add_(direction(mean, square, step, constants), alpha=-lr)
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_steps_follow_the_papers_formula(decay, eps):
    weight = torch.randn(7, 5, generator=generator(0))
    gradients = [torch.randn(7, 5, generator=generator(i)) for i in range(1, 12)]
    ours = trajectory(weight, gradients, 1e-2, AdamW(decay=decay, eps=eps))
    truth = paper.adamw(weight, gradients, 1e-2, 0.9, 0.999, eps, decay)
    assert torch.allclose(ours.double(), truth, rtol=0, atol=1e-6)


def test_steps_are_those_of_torch_adamw():
    weight = torch.randn(64, 48, generator=generator(0))
    gradients = [torch.randn(64, 48, generator=generator(i)) for i in range(1, 21)]
    parameter = torch.nn.Parameter(weight.clone())
    reference = torch.optim.AdamW([parameter], lr=3e-3, weight_decay=0.05)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        reference.step()
    ours = trajectory(weight, gradients, 3e-3, AdamW(decay=0.05))
    assert torch.allclose(ours, parameter.detach(), rtol=1e-6, atol=1e-7)


def test_direction_leaves_the_moments_alone():
    mean, square = torch.randn(4, 4), torch.rand(4, 4)
    before = mean.clone(), square.clone()
    direction(mean, square, 3, AdamW())
    assert torch.equal(mean, before[0]) and torch.equal(square, before[1])


@pytest.mark.parametrize("shape", [(), (9,), (10, 7), (3, 40)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_update_in_place_by_a_few_rows_is_that_of_the_whole_bit_for_bit(monkeypatch, shape, transposed):
    monkeypatch.setattr(adamw, "CHUNK_ELEMENTS", 8)
    gradient = torch.randn(shape, generator=generator(0))
    gradient = gradient.T.contiguous().T if transposed and gradient.ndim == 2 else gradient
    mean, square = torch.randn(shape, generator=generator(1)), torch.rand(shape, generator=generator(2))
    moments = mean.clone(), square.clone()
    update_moments(gradient, *moments, AdamW())
    expected = direction(*moments, 4, AdamW())
    change = adamw_update_(gradient, mean, square, 4, AdamW())
    assert change is gradient
    assert torch.equal(change, expected) and torch.equal(mean, moments[0]) and torch.equal(square, moments[1])

"""Chunked cross-entropy: the loss and every gradient of the whole one, without the whole one's memory."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from makers import generator

from owlore.kernels import cross_entropy
from owlore.kernels.cross_entropy import linear_cross_entropy


def whole(hidden, weight, labels, bias=None, scale=1.0, softcap=None):
    logits = scale * (hidden @ weight.T)
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def case(dtype=torch.float64, tokens=50, width=12, vocabulary=30, ignored=0.4):
    hidden = torch.randn(tokens, width, generator=generator(0), dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator(1), dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, generator=generator(2), dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,), generator=generator(3))
    labels[torch.rand(tokens, generator=generator(4)) < ignored] = -100
    return hidden, weight, bias, labels


@pytest.mark.parametrize("options", [{}, {"scale": 0.25}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}])
@pytest.mark.parametrize("with_bias", [True, False])
def test_loss_and_gradients_are_those_of_the_whole_logits(monkeypatch, options, with_bias):
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda vocabulary: 7)
    hidden, weight, bias, labels = case(torch.float32)
    leaves = [hidden, weight] + ([bias] if with_bias else [])
    extra = {"bias": bias if with_bias else None, **options}
    ours = linear_cross_entropy(hidden, weight, labels, **extra)
    truth = whole(hidden, weight, labels, **extra)
    assert torch.allclose(ours, truth, rtol=1e-5)
    for got, expected in zip(
        torch.autograd.grad(ours / 17, leaves), torch.autograd.grad(truth / 17, leaves), strict=True
    ):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_chunk_size_changes_nothing_but_memory(monkeypatch):
    hidden, weight, _, labels = case(torch.float32)
    losses = []
    for size in (1, 5, 1000):
        monkeypatch.setattr(cross_entropy, "chunk_rows", lambda vocabulary, size=size: size)
        losses.append(linear_cross_entropy(hidden, weight, labels))
    assert torch.allclose(torch.stack(losses), losses[0].expand(3), rtol=1e-6)


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_a_known_number_of_labels_changes_no_bit(ignored):
    hidden, weight, _, labels = case(torch.float32, ignored=ignored)
    losses = [linear_cross_entropy(hidden, weight, labels, count=count) for count in (None, int((labels >= 0).sum()))]
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss, [hidden, weight]) for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_frozen_head_gets_no_gradient_and_a_batch_without_labels_no_loss():
    hidden, weight, _, labels = case(torch.float32)
    weight = weight.detach()
    linear_cross_entropy(hidden, weight, labels).backward()
    assert weight.grad is None and hidden.grad is not None
    nothing = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert float(nothing.detach()) == 0.0
    nothing.backward()


def test_no_tensor_of_all_logits_exists(monkeypatch):
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda vocabulary: 8)
    hidden, weight, _, labels = case(torch.float32, tokens=64, width=6, vocabulary=500, ignored=0.0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (500,):
                largest = max(largest, out.numel() // 500)
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, labels).backward()
    assert largest == 8

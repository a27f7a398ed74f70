"""Row-wise int8: half a step of error at most, exact where it should be."""

import pytest
import torch
from makers import generator

from owlore.kernels.int8 import dequantise, quantise


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (40, 7), (1, 64)])
@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_half_a_step_of_the_rows_scale_at_most(shape, seed):
    W = torch.randn(shape, generator=generator(seed)) * torch.logspace(-6, 3, shape[0])[:, None]
    codes, scale = quantise(W)
    assert codes.dtype == torch.int8 and scale.shape == shape[:1]
    assert ((dequantise(codes, scale) - W).abs() <= scale[:, None] * 0.5001).all()


def test_codes_are_the_transcribed_formula():
    W = torch.randn(6, 9, generator=generator(1), dtype=torch.float64).float()
    codes, scale = quantise(W)
    for i in range(6):
        step = max(abs(float(w)) for w in W[i]) / 127
        assert float(scale[i]) == pytest.approx(step, rel=1e-6)
        assert [int(c) for c in codes[i]] == [round(float(w) / step) for w in W[i]]


def test_multiples_of_the_scale_and_zeros_come_back_exactly():
    W = torch.arange(-127.0, 128.0).repeat(3, 1) * torch.tensor([[1.0], [0.25], [0.0]])
    assert torch.equal(dequantise(*quantise(W)), W)
    bf16 = dequantise(*quantise(W.to(torch.bfloat16)), torch.bfloat16)
    assert bf16.dtype == torch.bfloat16 and torch.equal(bf16.float(), W)


def test_what_cannot_be_quantised_is_named():
    with pytest.raises(FloatingPointError, match="NaN"):
        quantise(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="expected a matrix"):
        quantise(torch.ones(3))

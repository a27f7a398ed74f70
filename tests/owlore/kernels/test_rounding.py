"""Stochastic rounding: unbiased, between neighbours, exact where nothing is to be rounded."""

import pytest
import torch
from makers import generator

from owlore.kernels.rounding import stochastic_round

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_representable_values_stay(dtype):
    values = torch.cat([torch.randn(500, generator=generator(0)), torch.zeros(3)]).to(dtype).float()
    assert torch.equal(stochastic_round(values, dtype, generator(1)).float(), values)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_mean_over_many_draws_is_the_value(dtype):
    values = torch.tensor([0.1, -0.3, 1.0003, -7.77, 3e-5, 1e-9]).repeat(20000, 1)
    rounded = stochastic_round(values, dtype, generator(0)).float()
    error = (rounded.mean(0) - values[0]).abs()
    spread = rounded.std(0) / 20000**0.5
    assert (error <= 5 * spread + 1e-12).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_the_two_neighbours(dtype):
    values = torch.randn(2000, generator=generator(2)) * 10
    rounded = torch.stack([stochastic_round(values, dtype, generator(i)).float() for i in range(20)])
    nearest = values.to(dtype).float()
    ulp = (torch.finfo(dtype).eps * values.abs()).clamp_min(torch.finfo(dtype).smallest_normal)
    assert ((rounded - values).abs() <= ulp).all()
    assert ((rounded == nearest).any(0)).all()
    assert (rounded != nearest).any()


@pytest.mark.parametrize("dtype", HALVES)
def test_zero_and_its_neighbourhood_keep_the_sign(dtype):
    tiny = torch.finfo(dtype).smallest_normal / 2**12
    values = torch.tensor([tiny, -tiny, 0.0]).repeat(2000, 1)
    rounded = stochastic_round(values, dtype, generator(0)).float()
    assert (rounded[:, 0] >= 0).all() and (rounded[:, 1] <= 0).all() and (rounded[:, 2] == 0).all()


def test_not_a_number_stays_one_and_other_formats_are_refused():
    values = torch.tensor([float("nan"), float("inf"), 1.0])
    rounded = stochastic_round(values, torch.bfloat16, generator(0))
    assert rounded[0].isnan() and rounded[1].isinf()
    with pytest.raises(ValueError, match="bfloat16 and float16"):
        stochastic_round(values, torch.float32, generator(0))

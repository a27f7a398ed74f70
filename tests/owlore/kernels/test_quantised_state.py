"""8-bit moments: the table, the error bound, the bytes."""

import pytest
import torch
from makers import generator

from owlore.kernels.quantised_state import BLOCK, code_table, dequantise, quantise, quantised_bytes


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_a_byte_of_ascending_values_with_zero_and_one(signed):
    table = code_table(signed)
    assert len(table) == 256 and (table.diff() > 0).all()
    assert 0.0 in table and table[-1] == 1.0 and (table[0] < 0) == signed


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(7,), (BLOCK,), (33, 70), (3, 5, 40)])
def test_every_value_is_replaced_by_the_nearest_of_its_block(signed, shape):
    values = torch.randn(shape, generator=generator(0)) * torch.logspace(-6, 0, shape[-1])
    values = values if signed else values.abs()
    state = quantise(values, signed=signed)
    found = dequantise(state)
    assert found.shape == values.shape and state.codes.dtype == torch.uint8
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1, keepdim=True)
    nearest = (code_table(signed) * scale[:, :, None] - flat[:, :, None]).abs().amin(2)
    error = torch.nn.functional.pad((found - values).flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK).abs()
    assert torch.allclose(error, nearest, atol=1e-7)


@pytest.mark.parametrize(("decade", "steps"), [(0, 128), (1, 64), (2, 32)])
def test_the_relative_error_is_half_a_step_of_the_decade(decade, steps):
    values = torch.logspace(-decade - 0.999, -decade, BLOCK)
    values[0] = 1.0  # the block's largest
    relative = ((dequantise(quantise(values, signed=False)) - values) / values).abs()
    assert relative.max() <= 0.9 / steps / 2 / 0.1 * 1.05


def test_zeros_stay_zeros_and_codes_are_stable():
    assert (dequantise(quantise(torch.zeros(300), signed=True)) == 0).all()
    once = dequantise(quantise(torch.randn(500, generator=generator(1)), signed=True))
    again = dequantise(quantise(once, signed=True))
    assert torch.allclose(once, again, rtol=0.02)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 100_000])
def test_bytes_are_as_counted(count):
    state = quantise(torch.randn(count, generator=generator(0)), signed=True)
    held = state.codes.numel() + 4 * state.scales.numel()
    assert held == quantised_bytes(count)

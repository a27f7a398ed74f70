"""NF4: the paper's sixteen values, bitsandbytes bit for bit, bytes by formula."""

import pytest
import torch
from makers import generator

from owlore.kernels import nf4

SHAPES = [(64, 64), (40, 33), (7,), (1, 1), (3, 5, 64), (512, 300)]


def weight(shape, seed=0, dtype=torch.float32):
    return (torch.randn(shape, generator=generator(seed)) * 0.02).to(dtype)


def test_the_codes_are_the_papers_quantiles_of_the_normal_distribution():
    from scipy.stats import norm

    top = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))  # appendix E: the mean of the two halves' outermost shares
    positive = norm.ppf(torch.linspace(top, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -norm.ppf(torch.linspace(top, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.tensor(sorted([*positive, 0.0, *negative]))
    assert torch.allclose(values / values.max(), torch.tensor(nf4.CODES, dtype=torch.float64), rtol=0, atol=2e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [True, False])
def test_every_value_becomes_the_nearest_code_of_its_block(shape, double):
    original = weight(shape)
    quantised = nf4.quantise(original, double=double)
    back = nf4.dequantise(quantised, torch.float32)
    flat = original.flatten().double()
    blocks = [flat[i : i + 64] for i in range(0, len(flat), 64)]
    sizes = nf4.magnitudes(quantised).double()
    for block, size, got in zip(blocks, sizes, back.flatten().double().split(64), strict=True):
        choices = torch.tensor(nf4.CODES, dtype=torch.float64) * block.abs().max()
        nearest = (block[:, None] - choices).abs().argmin(dim=1)
        assert torch.allclose(got, torch.tensor(nf4.CODES, dtype=torch.float64)[nearest] * size, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("double", [True, False])
def test_bytes_held_are_the_formulas(shape, block, double):
    quantised = nf4.quantise(weight(shape), block=block, double=double)
    held = sum(tensor.nbytes for tensor in quantised.tensors().values())
    assert held == nf4.planned_bytes(weight(shape).numel(), block, double)


def test_a_large_matrix_costs_4_127_bits_a_parameter():
    assert 8 * nf4.planned_bytes(4096 * 4096) / 4096**2 == pytest.approx(4.127, abs=5e-4)
    assert 8 * nf4.planned_bytes(4096 * 4096, double=False) / 4096**2 == 4.5


def test_zero_and_one_value_blocks_come_back_exactly():
    assert torch.equal(nf4.dequantise(nf4.quantise(torch.zeros(130), double=False)), torch.zeros(130))
    spikes = torch.zeros(4, 64)
    spikes[:, 3] = torch.tensor([1.0, -2.0, 1e-30, 5.0])
    assert torch.equal(nf4.dequantise(nf4.quantise(spikes, double=False)), spikes)


def test_quantising_again_changes_nothing():
    once = nf4.dequantise(nf4.quantise(weight((96, 64)), double=False))
    assert torch.equal(nf4.dequantise(nf4.quantise(once, double=False)), once)


def test_chunks_change_nothing(monkeypatch):
    original = weight((50, 33))
    whole = nf4.quantise(original)
    monkeypatch.setattr(nf4, "CHUNK", 128)
    pieces = nf4.quantise(original)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors().values(), pieces.tensors().values(), strict=True))
    in_chunks = nf4.dequantise(whole, torch.bfloat16)
    monkeypatch.undo()
    assert torch.equal(in_chunks, nf4.dequantise(whole, torch.bfloat16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    with pytest.raises(FloatingPointError):
        nf4.quantise(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="even"):
        nf4.quantise(torch.ones(8), block=7)


@pytest.mark.parametrize("shape", [(64, 64), (512, 300), (40, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
def test_codes_and_values_are_those_of_bitsandbytes(shape, dtype, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    original = weight(shape, dtype=dtype)
    ours = nf4.quantise(original, double=double)
    with torch.compiler.set_stance("force_eager"):  # its functions compile themselves, for seconds
        packed, state = functional.quantize_4bit(original, blocksize=64, quant_type="nf4", compress_statistics=double)
        back = functional.dequantize_4bit(packed, state)
    assert torch.equal(ours.packed, packed.flatten())
    if double:  # a few near ties of the magnitudes' codes go the other way there
        apart = (ours.absmax.int() - state.absmax.int()).abs()
        assert int(apart.max()) <= 1 and float(apart.float().mean()) < 0.01
    else:
        assert torch.equal(ours.absmax, state.absmax)
    same = nf4.dequantise(ours, dtype).float(), back.float()
    assert torch.allclose(*same, rtol=0.05 if double else 0, atol=0)

"""bfloat16 products only of bfloat16 values, and torch's global setting left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from htsr.numerics import backend, bf16, certified


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precision that was set at every torch product of `medium_gram`."""
    seen: list[str] = []
    exact = torch.Tensor.__matmul__

    def spy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return exact(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    return seen


def matrix(rows: int = 96, cols: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def test_bf16_values_are_told_from_others_by_their_bits() -> None:
    W = matrix().bfloat16().float().numpy()
    assert bf16.holds_bf16(W)
    assert bf16.holds_bf16(W.T)
    assert not bf16.holds_bf16(matrix().numpy())
    W[50, 3] = np.nextafter(W[50, 3], np.float32(10))
    assert not bf16.holds_bf16(W)


def test_bf16_slices_take_medium_and_give_the_gram_matrix(products: list[str]) -> None:
    W = matrix().bfloat16().float()
    G = bf16.medium_gram([W[:40].numpy(), W[40:].numpy()], 64)
    assert products == ["medium", "medium"]
    exact = W.double().T @ W.double()
    assert np.abs(G - exact.numpy()).max() <= 1e-5 * exact.abs().max()


def test_one_other_value_takes_the_whole_slice_to_full_precision(products: list[str]) -> None:
    W = matrix().bfloat16().float().numpy()
    W[7, 7] += np.float32(1e-4)
    G = bf16.medium_gram([W], 64)
    assert products == []
    assert np.allclose(G, W.astype(np.float64).T @ W, rtol=0, atol=1e-4)


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_the_setting_is_restored_even_after_an_exception(before: str) -> None:
    kept = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(before)
        with bf16.matmul_precision("medium"):
            assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(RuntimeError), bf16.matmul_precision("high"):
            raise RuntimeError
        with pytest.raises(ValueError, match=r"shapes|dimension|size|broadcast"):
            bf16.medium_gram([np.ones((4, 5), np.float32)], 6)
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(kept)


def test_certified_spectra_use_the_units_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch, products: list[str]
) -> None:
    monkeypatch.setattr(certified, "EXACT_SIDE", 64)
    monkeypatch.setattr(backend, "UNITS_SIDE", 64)
    W = (matrix(700, 300) * (torch.rand(700, 1, generator=torch.Generator().manual_seed(1)) ** -0.3)).bfloat16()
    monkeypatch.setattr(backend, "has_matrix_units", lambda: False)
    plain = certified.spectrum(lambda: [W], 700, 300)
    assert products == []
    monkeypatch.setattr(backend, "has_matrix_units", lambda: True)
    units = certified.spectrum(lambda: [W], 700, 300)
    assert products == ["medium"]
    assert units.route == plain.route == "certified"
    tail = min(units.refined, plain.refined)
    assert units.values[-tail:] == pytest.approx(plain.values[-tail:], rel=1e-9)

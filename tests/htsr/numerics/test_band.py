"""The reduction to a band and on to a tridiagonal matrix keeps the eigenvalues; the reflectors rebuild the matrix."""

from __future__ import annotations

import numpy as np
import pytest

from htsr.numerics import spectrum
from htsr.numerics.band import band_storage, band_to_tridiagonal, reflectors, to_band
from htsr.numerics.spectrum import gram_eigenvalues
from htsr.numerics.tridiagonal import tridiagonal_values


def planted(values: np.ndarray, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    return (Q * values) @ Q.T


SPECTRA = {
    "spread": lambda n: np.linspace(-1, 1, n),
    "graded": lambda n: np.geomspace(1e-12, 1, n),
    "clustered": lambda n: np.repeat([1e-3, 0.5, 1.0], [n - n // 2 - n // 3, n // 2, n // 3]),
    "singular": lambda n: np.concatenate([np.zeros(n // 2), np.linspace(0.1, 1, n - n // 2)]),
    "one large": lambda n: np.concatenate([np.linspace(0, 1e-6, n - 1), [1.0]]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "width"), [(1, 8), (2, 8), (9, 8), (10, 8), (17, 8), (64, 16), (131, 16), (200, 48)])
def test_eigenvalues_survive_both_stages(n: int, width: int, dtype: type, name: str) -> None:
    values = SPECTRA[name](n)
    A = np.asfortranarray(planted(values, n), dtype=dtype)
    A[np.triu_indices(n, 1)] = np.nan  # the upper triangle is never read
    to_band(A, width)
    d, e = band_to_tridiagonal(band_storage(A, width))
    found = tridiagonal_values(d, e) if n > 1 else d
    assert np.abs(found - np.sort(values)).max() <= 20 * np.sqrt(n) * np.finfo(dtype).eps


@pytest.mark.parametrize("power", [-40, 40])
def test_a_power_of_two_scales_the_band_exactly(power: int) -> None:
    A = np.asfortranarray(planted(np.linspace(0.1, 1, 70)), dtype=np.float32)
    B = np.asfortranarray(A * np.float32(2.0**power))
    to_band(A, 8)
    to_band(B, 8)
    assert np.array_equal(band_storage(A, 8) * np.float32(2.0**power), band_storage(B, 8))


def test_the_reflectors_turn_the_matrix_into_its_band() -> None:
    n, width = 75, 8
    A = planted(np.linspace(-1, 2, n))
    work = np.asfortranarray(A)
    triangles = to_band(work, width)
    Q = np.eye(n)
    for j, T in enumerate(triangles):
        V = np.zeros((n, len(T)))
        V[(j + 1) * width :] = reflectors(work[(j + 1) * width :, j * width : (j + 1) * width])
        Q = Q @ (np.eye(n) - V @ T @ V.T)
    B = Q.T @ A @ Q
    assert np.allclose(Q.T @ Q, np.eye(n), atol=1e-13)
    assert np.abs(np.tril(B, -width - 1)).max() < 1e-13
    for offset in range(width + 1):
        assert np.allclose(np.diagonal(B, -offset), band_storage(work, width)[offset, : n - offset], atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gram_eigenvalues_are_the_same_by_one_stage_and_by_two(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    W = np.random.default_rng(0).standard_t(3, (300, 210)).astype(dtype)
    direct = gram_eigenvalues(W.T @ W)
    monkeypatch.setattr(spectrum, "BAND_SIDE", {np.dtype(dtype): 200})
    assert np.abs(gram_eigenvalues(W.T @ W) - direct).max() <= 30 * np.finfo(dtype).eps * direct[-1]

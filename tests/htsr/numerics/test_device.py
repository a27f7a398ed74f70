"""The torch route, on CPU tensors: the spectra of the LAPACK route, TF32 only where it is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from htsr import rows
from htsr.errors import BadInput
from htsr.model.layers import views
from htsr.model.source import open_source
from htsr.numerics import certified
from htsr.numerics.device import holds_tf32, products, torch_backend
from htsr.numerics.powerlaw import fit_power_law
from htsr.numerics.spectrum import matrix_slices


def heavy(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.02 * rng.standard_normal((rows, cols)) * (rng.pareto(3, (rows, 1)) + 1)).astype(np.float32)


def spectrum(W: np.ndarray, **options: object) -> certified.Spectrum:
    return certified.spectrum(
        lambda: matrix_slices(W),
        *W.shape,
        square=lambda: W[: W.shape[1]],
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_torch_route_gives_the_fit_of_the_lapack_route(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certified, "EXACT_SIDE", 64)
    W = heavy((240, 500)[seed % 2], 240, seed)
    ours, theirs = spectrum(W, backend=torch_backend("cpu")), spectrum(W)
    assert ours.route in ("certified", "escalated")
    a, b = (fit_power_law(found.values[found.values > 1e-5]) for found in (ours, theirs))
    assert a.n_tail == b.n_tail
    assert a.alpha == pytest.approx(b.alpha, abs=1e-6)
    exact = spectrum(W, precision="fp64", backend=torch_backend("cpu"))
    assert exact.values == pytest.approx(spectrum(W, precision="fp64").values, rel=1e-9, abs=1e-12)


def test_tf32_values_are_those_of_bfloat16_and_float16() -> None:
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    assert holds_tf32(W.bfloat16().float().numpy())
    assert holds_tf32(W.half().float().numpy())
    assert not holds_tf32(W.numpy())
    probe = W.bfloat16().float()
    probe[3, 3] += 1e-5
    assert not holds_tf32(probe.numpy())


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", "high"), ("float16", "high"), ("float32", "highest")])
def test_tf32_is_allowed_for_exact_values_alone(dtype: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    exact = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: seen.add(torch.get_float32_matmul_precision()) or exact(a, b)
    )
    before = torch.get_float32_matmul_precision()
    W = torch.from_numpy(heavy(90, 60)).to(getattr(torch, dtype))
    torch_backend("cpu").reduce([W], 60, 1.0)
    assert seen == {expected}
    assert torch.get_float32_matmul_precision() == before


def test_the_setting_is_restored_after_an_exception() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError), products("high"):
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


def test_not_finite_is_bad_input() -> None:
    W = heavy(90, 60)
    W[0, 0] = np.inf
    with pytest.raises(BadInput, match="NaN or infinite"):
        spectrum(W, backend=torch_backend("cpu"))


def test_a_row_on_a_device_is_the_row_of_the_cpu() -> None:
    source = open_source({"layers.0.q_proj.weight": torch.from_numpy(heavy(90, 60))})
    (view,) = views(source)
    here, there = rows.analyse(source, view)[0], rows.analyse(source, view, device="cpu:0")[0]
    assert there["n_tail"] == here["n_tail"]
    assert there["alpha"] == pytest.approx(here["alpha"], rel=1e-9)
    assert there["entropy"] == pytest.approx(here["entropy"], rel=1e-9)


@pytest.mark.gpu
def test_the_torch_route_on_a_gpu() -> None:
    W = heavy(3000, 1400)
    ours, theirs = spectrum(W, backend=torch_backend("cuda")), spectrum(W)
    a, b = (fit_power_law(found.values[found.values > 1e-5]) for found in (ours, theirs))
    assert a.n_tail == b.n_tail
    assert a.alpha == pytest.approx(b.alpha, abs=1e-6)

"""The torch route, on CPU tensors: the spectra of the LAPACK route, TF32 only where it is exact."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import htsr
from htsr import matrix_row
from htsr.errors import BadInput
from htsr.model.layers import views
from htsr.model.memory import ModuleSource
from htsr.model.open import open_source
from htsr.numerics import certified
from htsr.numerics.backend import Backend
from htsr.numerics.bf16 import matmul_precision
from htsr.numerics.device import exact_side, holds_tf32, largest_exact, torch_backend
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


def fits_agree(W: np.ndarray, backend: Backend, alpha: float, precision: str = "auto") -> certified.Spectrum:
    """Same tail and alpha as LAPACK in float64; the spectrum of `backend`."""
    ours, theirs = spectrum(W, backend=backend, precision=precision), spectrum(W, precision="fp64")
    a, b = (fit_power_law(found.values[found.values > 1e-5]) for found in (ours, theirs))
    assert a.n_tail == b.n_tail
    assert a.alpha == pytest.approx(b.alpha, abs=alpha)
    assert np.count_nonzero(ours.values) == np.count_nonzero(theirs.values)
    return ours


def with_equal_columns(W: np.ndarray) -> np.ndarray:
    W[:, 1] = W[:, 0]
    return W


def rounded(W: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 values."""
    return torch.from_numpy(W).bfloat16().float().numpy()


@pytest.mark.parametrize(
    "W",
    [heavy(240, 240), heavy(500, 240, 1), heavy(150, 400, 2), with_equal_columns(heavy(200, 200, 3))],
    ids=["square", "tall", "wide", "singular"],
)
def test_up_to_the_backends_exact_side_float64_alone_decides(W: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certified, "EXACT_SIDE", 64)
    backend = torch_backend("cpu", exact_up_to=min(W.shape))
    monkeypatch.setattr(certified, "_certified", None)  # it is not asked
    assert fits_agree(W, backend, alpha=1e-10).route == "fp64"
    assert spectrum(W, backend=backend, precision="fp32").route == "fp32"


def test_beyond_the_backends_exact_side_the_certified_route_begins() -> None:
    found = fits_agree(heavy(240, 200), torch_backend("cpu", exact_up_to=199), alpha=1e-6)
    assert found.route in ("certified", "escalated")


def test_a_device_without_full_rate_float64_has_the_side_of_the_cpu() -> None:
    assert exact_side("cpu") is None
    assert torch_backend("cpu").exact_side is None


def test_three_float64_matrices_of_the_largest_exact_side_take_a_third_of_the_memory() -> None:
    free = 64 << 30
    side = largest_exact(free)
    assert 3 * 8 * side**2 <= free / 3 < 3 * 8 * (side + 1) ** 2
    assert largest_exact(0) == certified.EXACT_SIDE


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_slice_travels_in_its_own_dtype_and_is_widened_on_the_device(
    dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    W = heavy(90, 60).astype(dtype)
    W.flags.writeable = False
    sent: list[np.dtype] = []
    to = torch.Tensor.to

    def record(S: torch.Tensor, where: object) -> torch.Tensor:
        if isinstance(where, str):
            sent.append(S.numpy().dtype)
        return to(S, where)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch.Tensor, "to", record)
    values, _ = torch_backend("cpu").exact([W[:40], W[40:]], 60)
    assert sent == [np.dtype(dtype)] * 2
    assert values == pytest.approx(np.linalg.svd(W.astype(np.float64), compute_uv=False)[::-1] ** 2, rel=1e-10)


def test_tf32_values_are_those_of_bfloat16_and_float16() -> None:
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    assert holds_tf32(W.bfloat16().float())
    assert holds_tf32(W.half().float())
    assert not holds_tf32(W)
    assert not holds_tf32(W.T[3:, 5:])
    probe = W.bfloat16().float()
    probe[3, 3] += 1e-5
    assert not holds_tf32(probe)


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
    with pytest.raises(RuntimeError), matmul_precision("high"):
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


def test_not_finite_is_bad_input() -> None:
    W = heavy(90, 60)
    W[0, 0] = np.inf
    with pytest.raises(BadInput, match="NaN or infinite"):
        spectrum(W, backend=torch_backend("cpu"))


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_on_a_device_is_the_row_of_the_cpu_and_its_weights_go_there_as_they_are(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source({"layers.0.q_proj.weight": torch.from_numpy(heavy(*shape)).to(dtype)})
    (view,) = views(source)
    here = matrix_row.analyse(source, view)[0]
    monkeypatch.delattr(ModuleSource, "window")
    there = matrix_row.analyse(source, view, device="cpu:0")[0]
    assert there["n_tail"] == here["n_tail"]
    assert there["alpha"] == pytest.approx(here["alpha"], rel=1e-9)
    assert there["entropy"] == pytest.approx(here["entropy"], rel=1e-9)


GPU_CASES = {
    "tall": lambda: heavy(3000, 1400),
    "singular": lambda: with_equal_columns(heavy(2048, 2048)),
    "bfloat16": lambda: rounded(heavy(4096, 1024)),
    "wide bfloat16": lambda: rounded(heavy(1200, 2000)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
def test_the_float64_route_on_a_gpu(case: str) -> None:
    W = GPU_CASES[case]()
    fits_agree(W, torch_backend("cuda"), alpha=1e-6)  # the route this device takes by itself
    assert fits_agree(W, torch_backend("cuda", exact_up_to=4096), alpha=1e-9).route == "fp64"


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["tall", "singular", "wide bfloat16"])
def test_the_certified_route_on_a_gpu(case: str) -> None:
    found = fits_agree(GPU_CASES[case](), torch_backend("cuda", exact_up_to=0), alpha=1e-6)
    assert found.route in ("certified", "escalated")


@pytest.mark.gpu
def test_a_gpu_with_full_rate_float64_is_exact_as_far_as_its_memory_allows() -> None:
    side = exact_side("cuda")
    if side is None:
        pytest.skip("float64 is slow on this GPU")
    free, _ = torch.cuda.mem_get_info("cuda")
    assert side >= largest_exact(free // 2)


@pytest.mark.gpu
def test_a_scan_on_a_gpu_is_the_scan_on_the_cpu() -> None:
    same_spectra(*(demo(device=device, workers=3) for device in ("cuda", "cpu")))


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_scanned_there() -> None:
    weights = {t.name: open_source("demo").read(t.name) for t in open_source("demo").tensors}
    moved = {name: W.cuda() for name, W in weights.items()}
    same_spectra(*(demo(model, device=device) for model, device in ((moved, "cuda"), (weights, "cpu"))))


@pytest.mark.gpu
def test_the_lod_of_a_gpu_is_that_of_the_cpu() -> None:
    """Both run the text in float32; sums in another order may move few weights across the limit, here 4 of a matrix."""
    there, here = (demo(device=device, precision="fp64", calibration="builtin") for device in ("cuda", "cpu"))
    assert here.lod.notna().sum() == 56
    assert here.lod.max() > 1
    one_weight = 100 / (here.rows * here.cols).astype(float)
    assert ((there.lod - here.lod).abs() / one_weight).max() <= 4.5
    assert there.lod.sum() == pytest.approx(here.lod.sum(), rel=2e-3)


def demo(model: object = "demo", **options: object) -> pd.DataFrame:
    settings: dict[str, object] = {"calibration": None, "quiet": True, "fresh": True}
    return htsr.scan(model, **(settings | options)).frame  # type: ignore[arg-type]


def same_spectra(there: pd.DataFrame, here: pd.DataFrame) -> None:
    assert list(there.tensor) == list(here.tensor)
    assert list(there.status) == list(here.status)
    read = here.status == "ok"
    assert read.sum() > 50
    assert list(there.n_tail[read]) == list(here.n_tail[read])
    for name in ("alpha", "entropy", "stable_rank"):
        assert there[name][read].to_numpy() == pytest.approx(here[name][read].to_numpy(), abs=1e-8, rel=1e-8), name

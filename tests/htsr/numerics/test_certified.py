"""Certified spectra against LAPACK's singular values in float64: same tail, same alpha, or an honest escalation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from makers import ks_distances, near_tie

from htsr.errors import BadInput
from htsr.numerics import certified
from htsr.numerics.certified import Spectrum, merge
from htsr.numerics.fullrank import has_full_rank
from htsr.numerics.metrics import spectrum_metrics
from htsr.numerics.powerlaw import fit_power_law
from htsr.numerics.ritz import residual_norms, ritz_values
from htsr.numerics.spectrum import gram, matrix_slices
from htsr.numerics.tridiagonal import Tridiagonal, reduce

SIDE = 280


@pytest.fixture(autouse=True)
def small_threshold(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Matrices of a test's size take the route of large ones."""
    monkeypatch.setattr(certified, "EXACT_SIDE", 100)
    return


def heavy(rows: int, cols: int, tail: float, seed: int = 0) -> np.ndarray:
    """Gaussian rows of Pareto length: a spectrum with a heavy tail (tail 0: none)."""
    rng = np.random.default_rng(seed)
    scales = rng.pareto(tail, (rows, 1)) + 1 if tail else np.ones((rows, 1))
    return (0.02 * rng.standard_normal((rows, cols)) * scales).astype(np.float32)


def exact(W: np.ndarray) -> np.ndarray:
    return np.sort(np.linalg.svd(W.astype(np.float64), compute_uv=False)) ** 2


def run(W: np.ndarray, **options: object) -> Spectrum:
    square = W[: W.shape[1]] if len(W) >= W.shape[1] else W[:, : len(W)]
    return certified.spectrum(lambda: matrix_slices(W), *W.shape, square=lambda: square, **options)  # type: ignore[arg-type]


def test_the_fit_is_float64s_on_every_matrix() -> None:
    """120 matrices, square, tall and wide: same n_tail, alpha to 1e-6, whichever route was taken."""
    routes: Counter[str] = Counter()
    for seed in range(120):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(160, 320))
        m = int(n * rng.choice([1, 1, 1.4, 2.7]))
        W = heavy(m, n, rng.choice([0, 1.5, 2, 3, 4, 6]), seed)
        W = W.T.copy() if seed % 5 == 0 else W
        found, truth = run(W), exact(W)
        mine, theirs = fit_power_law(found.values[found.values > 1e-5]), fit_power_law(truth[truth > 1e-5])
        assert mine.n_tail == theirs.n_tail, seed
        assert mine.alpha == pytest.approx(theirs.alpha, abs=1e-6)
        assert mine.ks_d == pytest.approx(theirs.ks_d, abs=1e-7)
        assert mine.xmin == pytest.approx(theirs.xmin, rel=1e-7)
        assert np.all(np.diff(found.values) >= 0)
        ours, reference = spectrum_metrics(found.values, max(W.shape)), spectrum_metrics(truth, max(W.shape))
        assert ours.entropy == pytest.approx(reference.entropy, abs=1e-6)
        assert ours.alpha_hill == pytest.approx(reference.alpha_hill, rel=1e-4)
        assert ours.log10_norm == pytest.approx(reference.log10_norm, abs=1e-6)
        routes[found.route] += 1
        assert bool(found.reason) == (found.route == "escalated")
    assert routes["certified"] > 70
    assert routes["escalated"] > 5


@pytest.mark.parametrize("tail", [3.0, 5.0])
def test_refined_values_are_good_to_1e_10_where_float32_is_not(tail: float) -> None:
    W = heavy(2 * SIDE, SIDE, tail)
    found, truth = run(W), exact(W)
    rough = certified.spectrum(lambda: matrix_slices(W), *W.shape, precision="fp32").values
    assert found.route == "certified"
    n_tail = fit_power_law(truth).n_tail
    refined = np.abs(found.values / truth - 1)[-n_tail:].max()
    assert refined < 1e-9
    assert np.abs(rough / truth - 1)[-n_tail:].max() > 10 * refined


def test_ritz_values_on_exact_vectors_are_the_eigenvalues_and_never_above() -> None:
    W = heavy(200, 80, 3).astype(np.float64)
    values, vectors = np.linalg.eigh(W.T @ W)
    mixed = vectors[:, -30:] @ np.random.default_rng(0).standard_normal((30, 30))  # any basis of the span
    assert ritz_values([W[:90], W[90:]], mixed) == pytest.approx(values[-30:], rel=1e-9)
    off = vectors[:, -30:] + 1e-4 * np.random.default_rng(1).standard_normal((80, 30))
    theta = ritz_values([W], off)
    assert np.all(theta <= values[-30:] * (1 + 1e-13))
    assert np.abs(theta / values[-30:] - 1).max() < 1e-4
    norms = residual_norms([W[:90], W[90:]], off, values[-30:])
    assert np.allclose(norms, np.linalg.norm(W.T @ W @ off - off * values[-30:], axis=0) / np.linalg.norm(off, axis=0))


def test_tridiagonal_gives_eigenvalues_and_chosen_vectors() -> None:
    W = heavy(300, 150, 3)
    G = gram([W], 150, np.float32)
    values, vectors = np.linalg.eigh(G.astype(np.float64))
    reduced = Tridiagonal(np.asfortranarray(G))
    assert np.abs(reduced.values - values).max() < 3e-6 * values[-1]
    chosen = np.array([0, 70, 147, 148, 149])
    V = reduced.vectors(chosen)
    assert np.abs(np.sum(V * vectors[:, chosen], axis=0)) == pytest.approx(np.ones(5), abs=1e-3)
    assert len(reduced.vectors(np.arange(20, 150)).T) == 130  # several groups


@pytest.mark.parametrize("side", [1, 2, 3, 33, 70])
def test_a_tridiagonal_reduction_has_one_reflector_fewer_than_rows(side: int) -> None:
    W = heavy(90, side, 5)
    G = gram([W], side)
    d, e, tau = reduce(G.copy(order="F"))
    assert (d.shape, e.shape, tau.shape) == ((side,), (side - 1,), (side - 1,))
    T = np.diag(d) + np.diag(e, 1) + np.diag(e, -1)
    assert np.linalg.eigvalsh(T) == pytest.approx(np.linalg.eigvalsh(G), rel=1e-9, abs=1e-9)


def test_radii_of_merged_values_shrink_with_the_distance_to_the_rest() -> None:
    values = np.arange(1.0, 11.0)
    merged, radius = merge(values, values[6:] + 1e-9, 6, np.full(10, 1e-3))
    assert np.all(radius[:6] == 1e-3)
    assert np.all(np.diff(radius[6:]) < 0)
    assert radius[6] == pytest.approx(1e-6, rel=0.01)
    assert np.array_equal(merged[:6], values[:6])


def test_a_near_tie_is_escalated_and_its_cost_counted() -> None:
    """Spectra planted so that two candidates are 1e-9 apart in D: no float32 may decide between them."""
    escalated = 0
    for seed in range(14):
        rng = np.random.default_rng(seed)
        U, V = (np.linalg.qr(rng.standard_normal((SIDE, SIDE)))[0] for _ in range(2))
        planted = near_tie(np.sort(rng.pareto(2.5, SIDE) + 1), gap=1e-10)
        distances = np.sort(ks_distances(planted)[1])
        W = (U * np.sqrt(planted)) @ V
        found, whole = run(W), run(W, precision="fp64")
        if distances[1] - distances[0] < 1e-9:
            escalated += 1
            assert found.route == "escalated"
            assert found.flops > whole.flops
            assert np.array_equal(found.values, whole.values)
        assert fit_power_law(found.values).n_tail == fit_power_law(whole.values).n_tail
    assert escalated >= 3


@pytest.mark.parametrize(
    ("rank", "route"), [(SIDE - 1, "certified"), (SIDE - 9, "certified"), (SIDE - 90, "escalated")]
)
def test_lost_rank_is_counted_exactly_by_either_route(rank: int, route: str) -> None:
    rng = np.random.default_rng(rank)
    W = heavy(SIDE, SIDE, 4)
    W[:, rank:] = W[:, rng.integers(0, rank, SIDE - rank)]  # copied columns: exactly singular
    found = run(W)
    assert found.route == route
    assert np.count_nonzero(found.values) == rank
    assert not has_full_rank(W)


def test_full_rank_is_shown_for_ordinary_matrices_and_scales_do_not_matter() -> None:
    shown = 0
    for seed in range(20):
        W = heavy(SIDE, SIDE, 2, seed) * 10.0 ** np.random.default_rng(seed).uniform(-15, 15, (SIDE, 1))
        shown += has_full_rank(W)
    assert shown >= 17
    for seed in range(20):  # singular only by a sum of columns
        W = heavy(SIDE, SIDE, 0, seed)
        W[:, 5] = W[:, 6] + W[:, 7]
        assert not has_full_rank(W)
    assert not has_full_rank(np.zeros((5, 5), np.float32))
    assert not has_full_rank(np.full((5, 5), np.nan, np.float32))


def test_a_singular_value_that_no_gram_matrix_sees_counts_in_the_rank() -> None:
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((60, 60)))[0] for _ in range(2))
    for smallest, rank in ((1e-10, 60), (0.0, 59)):
        sigma = np.concatenate([[smallest], np.linspace(0.5, 1, 59)])
        W = (U * sigma) @ V
        found = run(W)
        assert found.route == "fp64"
        assert np.count_nonzero(found.values) == rank
        truth = spectrum_metrics(sigma**2, 60)
        assert spectrum_metrics(found.values, 60).entropy == pytest.approx(truth.entropy, rel=1e-9)


@pytest.mark.parametrize("rows", [60, 200])
def test_float64_counts_every_rank_that_svd_counts(rows: int) -> None:
    """Zeros and values that no Gram matrix sees, square and tall: the rank is that of the singular values."""
    rng = np.random.default_rng(rows)
    U, V = np.linalg.qr(rng.standard_normal((rows, 60)))[0], np.linalg.qr(rng.standard_normal((60, 60)))[0]
    for small in ([0.0], [1e-9, 1e-8], [0.0, 0.0, 1e-10], [1e-11]):
        sigma = np.concatenate([small, np.linspace(0.2, 1, 60 - len(small))])
        W = (U * sigma) @ V
        found = run(W, precision="fp64").values
        assert np.count_nonzero(found) == np.count_nonzero(small) + 60 - len(small)
        assert np.sqrt(found[: len(small)]) == pytest.approx(small, rel=0.3)


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**-40, 2.0**40])
def test_scale_is_taken_out_before_float32_squares_it(scale: float) -> None:
    W = heavy(2 * SIDE, SIDE, 3).astype(np.float64)
    reference, scaled = run(W, relative_cut=1e-12), run(W * scale, relative_cut=1e-12)
    assert reference.route == scaled.route == "certified"
    tail = reference.values[-reference.refined :]
    assert scaled.values[-reference.refined :] == pytest.approx(tail * scale**2, rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_is_bad_input_by_every_route(bad: float) -> None:
    W = heavy(2 * SIDE, SIDE, 3)
    W[-1, 3] = bad
    for precision in ("auto", "fp32", "fp64"):
        with pytest.raises(BadInput, match="NaN or infinite"):
            run(W, precision=precision)


def test_beyond_float32_is_done_in_float64() -> None:
    W = heavy(2 * SIDE, SIDE, 3).astype(np.float64)
    W[-3:] *= 1e30
    found = run(W)
    assert found.route == "escalated"
    assert found.values[-3:] == pytest.approx(exact(W)[-3:], rel=1e-9)


def test_zero_and_tiny_matrices_take_the_exact_route() -> None:
    assert np.array_equal(run(np.zeros((300, 200))).values, np.zeros(200))
    assert run(1e-9 * heavy(300, 200, 3)).route == "escalated"  # nothing above the absolute cut


def test_small_matrices_are_float64_and_precision_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    W = heavy(2 * SIDE, SIDE, 3)
    assert run(W, precision="fp32").route == "fp32"
    assert run(W, precision="fp64").route == "fp64"
    monkeypatch.setattr(certified, "EXACT_SIDE", 1024)
    small = run(W)
    assert small.route == "fp64"
    assert np.array_equal(small.values, run(W, precision="fp64").values)

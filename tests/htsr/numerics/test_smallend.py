"""Small singular values of planted matrices: right where no Gram matrix sees them, and zeros counted, or no answer."""

from __future__ import annotations

import numpy as np
import pytest

from htsr.numerics.smallend import CLEAR, depth, small_end
from htsr.numerics.spectrum import gram, matrix_slices
from htsr.numerics.tridiagonal import Tridiagonal

SIDE = 240
EPS = float(np.finfo(np.float64).eps)


def planted(small: list[float], rows: int, seed: int = 0) -> np.ndarray:
    """Singular values `small` and then 0.05 to 1, of largest 1."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((size, SIDE)))[0] for size in (rows, SIDE))
    sigma = np.concatenate([small, np.linspace(0.05, 1, SIDE - len(small))])
    return (U * sigma) @ V.T


def solved(W: np.ndarray, q: int) -> np.ndarray | None:
    """The q smallest values, with the float32 decomposition of the Gram matrix."""
    reduced = Tridiagonal(gram([W], SIDE, np.float32))
    radius = 1e-7
    found = small_end(
        lambda: matrix_slices(W),
        reduced.vectors(np.arange(q)),
        reduced.solve,
        following=float(reduced.values[q]) - radius,
        shift=max(radius, -2 * float(reduced.values[0])),
        limit=max(W.shape) * EPS,
    )
    return None if found is None else found.values


@pytest.mark.parametrize("rows", [SIDE, 700])
@pytest.mark.parametrize("smallest", [1e-4, 1e-6, 1e-9, 1e-11])
def test_values_that_float32_calls_zero_are_found(smallest: float, rows: int) -> None:
    small = [smallest, 3 * smallest, 4e-4]
    for seed in range(5):
        found = solved(planted(small, rows, seed), 3)
        assert found is not None
        assert np.all(np.abs(np.sqrt(found) - small) <= 0.3 * np.array(small))
        assert np.all(found >= np.square(small) * (1 - 1e-3) - 1e-30)  # never below: the proof is about how far above


@pytest.mark.parametrize("zeros", [1, 2, 7])
def test_zeros_are_counted(zeros: int) -> None:
    for seed in range(5):
        found = solved(planted([0.0] * zeros + [1e-8, 2e-4], SIDE, seed), zeros + 2)
        assert found is not None
        assert np.array_equal(found == 0, np.arange(zeros + 2) < zeros)
        assert np.sqrt(found[zeros:]) == pytest.approx([1e-8, 2e-4], rel=0.3)


def test_copied_and_summed_columns_cost_one_value_each() -> None:
    W = np.random.default_rng(0).standard_normal((SIDE, SIDE))
    W[:, 3] = W[:, 7]
    W[:, 5] = W[:, 9] + W[:, 11]
    found = solved(W / np.linalg.norm(W, 2), 6)
    assert found is not None
    assert np.count_nonzero(found == 0) == 2


@pytest.mark.parametrize("power", [-60, 50])
def test_a_power_of_two_changes_nothing(power: int) -> None:
    W = planted([1e-9, 1e-5], SIDE)
    reduced = Tridiagonal(gram([W], SIDE, np.float32))
    V, factor = reduced.vectors(np.arange(2)), 2.0**power
    options = {"following": float(reduced.values[2]), "shift": 1e-7, "limit": SIDE * EPS}
    plain = small_end(lambda: [W], V, reduced.solve, **options)
    moved = small_end(
        lambda: [W * factor],
        V,
        lambda R, shift: reduced.solve(R, shift / factor**2) / factor**2,
        **{name: x * (factor if name == "limit" else factor**2) for name, x in options.items()},
    )
    assert plain is not None
    assert moved is not None
    assert np.array_equal(moved.values, plain.values * factor**2)


def test_a_value_at_the_limit_of_the_rank_gets_no_answer() -> None:
    assert solved(planted([SIDE * EPS, 1e-4], SIDE), 2) is None


def test_a_value_clearly_below_the_limit_is_zero_up_to_and_with_half_of_it() -> None:
    W = np.diag([2.0**-30, *np.ones(15)])
    found = small_end(lambda: [W], np.eye(16)[:, :1], lambda R, _: R, following=1.0, shift=1e-7, limit=CLEAR * 2.0**-30)
    assert found is not None
    assert found.values.tolist() == [0.0]
    assert found.products == 1


def test_a_missed_vector_gets_no_answer() -> None:
    """Of three values near zero only two are given vectors: the next value is no bound for the complement."""
    W = planted([1e-9, 1e-9, 1e-9], SIDE)
    reduced = Tridiagonal(gram([W], SIDE, np.float32))
    following = float(reduced.values[2]) - 1e-7
    assert (
        small_end(
            lambda: [W], reduced.vectors(np.arange(2)), reduced.solve, following=following, shift=1e-7, limit=1e-13
        )
        is None
    )


def test_depth_leaves_out_only_values_far_above_their_radius() -> None:
    radius = np.full(64, 1.0)
    assert depth(np.arange(64.0), radius) == 5
    assert depth(np.arange(64.0) + 9, radius) == 0
    assert depth(np.arange(64.0) / 64, radius) == 0  # too many

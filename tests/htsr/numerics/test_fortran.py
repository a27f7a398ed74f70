"""BLAS and LAPACK through SciPy's pointers: parts of arrays in place, the lock free, SciPy's package left alone."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from htsr.numerics.fortran import call, integers, lead


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_product_of_parts_lands_in_a_part(dtype: type) -> None:
    rng = np.random.default_rng(0)
    A, B = (np.asfortranarray(rng.standard_normal((50, 40)), dtype=dtype) for _ in range(2))
    C: np.ndarray = np.full((60, 30), 7, dtype, order="F")
    part = C[4:, 5:]
    call("gemm", dtype, b"N", b"T", 20, 10, 30, 1.0, A[5:, 3:], lead(A), B[2:, 1:], lead(B), 0.0, part, lead(C))
    assert np.allclose(C[4:24, 5:15], A[5:25, 3:33] @ B[2:12, 1:31].T, atol=1e-4 if dtype is np.float32 else 1e-12)
    C[4:24, 5:15] = 7
    assert np.all(C == 7)


def test_a_column_has_its_own_height_for_leading_dimension() -> None:
    assert lead(np.ones((5, 1))) == 5
    assert lead(np.ones((1, 5))) >= 1
    assert lead(np.ones((9, 4), order="F")[2:, 1:]) == 9


def test_info_comes_back() -> None:
    A, info = np.asfortranarray(-np.eye(4)), integers(1)
    call("potrf", A.dtype, b"L", 4, A, 4, info)
    assert info[0] == 1


def test_other_threads_run_meanwhile() -> None:
    side = 700
    A = np.asfortranarray(np.eye(side) + np.random.default_rng(0).random((side, side)))
    d, e, tau, work = (np.empty(size) for size in (side, side, side, 32 * side))
    thread = threading.Thread(
        target=call, args=("sytrd", A.dtype, b"L", side, A, side, d, e, tau, work, len(work), integers(1))
    )
    thread.start()
    turns = 0
    while thread.is_alive():
        turns += 1
        time.sleep(1e-4)
    assert turns > 3


CODE = """
import sys
from htsr.numerics.fortran import load
load()
assert "scipy.linalg" not in sys.modules and "scipy.linalg.cython_lapack" in sys.modules
import numpy as np, scipy.linalg, scipy.linalg.cython_blas
from scipy.linalg import cython_lapack
assert "dsytrd" in cython_lapack.__pyx_capi__
assert np.allclose(scipy.linalg.eigh(np.diag([1.0, 2.0]))[0], [1, 2])
"""


def test_scipys_package_is_not_imported_and_works_when_it_is() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)

"""Small matrices side by side: one BLAS thread each, in every BLAS that the work loads."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import numpy as np
from threadpoolctl import threadpool_info
from htsr.numerics.spectrum import gram_eigenvalues
from htsr.workers import run

def work(n):
    gram_eigenvalues(np.eye(n))
    return max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")

print(sorted(found for _, found in run(work, [20, 30], lambda n: n, 2)))
"""


def test_a_blas_that_is_loaded_late_is_limited_too() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[1, 1]"

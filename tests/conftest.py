"""Shared fixtures. The default run needs neither a GPU nor a network nor anything beside this checkout."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for library in ("OMP", "OPENBLAS", "MKL"):  # read when numpy and torch are loaded, and by processes that tests start
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
for cache in ("HTSR_CACHE", "OWLORE_CACHE"):  # neither the user's nor an earlier run's
    os.environ[cache] = tempfile.mkdtemp(prefix=f"{cache.lower()}-")
    atexit.register(shutil.rmtree, os.environ[cache], ignore_errors=True)


def uses_gpu(config: pytest.Config) -> bool:
    return "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """One process for a GPU, whose memory and time tests measure, and for a debugger."""
    if uses_gpu(config) or config.option.usepdb:
        config.option.numprocesses = 0


def pytest_configure(config: pytest.Config) -> None:
    """Without `-m gpu` nothing sees a GPU: the default run compares bits, which a GPU's sums do not repeat."""
    if not uses_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside a developer's checkout; a user has none."""
    if not (SHARED / "models").is_dir():
        pytest.skip("../shared (real models and data) is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """stories260K: a tiny pretrained Llama with real fp32 weights."""
    return shared / "models" / "stories260K"

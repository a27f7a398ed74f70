"""How the spectra of many matrices share the cores: small ones side by side, large ones with all cores each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from threadpoolctl import threadpool_limits

from htsr.errors import UsageError
from htsr.numerics.fortran import load

LARGE_SIDE = 2048  # from here on BLAS uses several cores well; below, its threads only wait for each other
MAX_WORKERS = 8  # each holds one Gram matrix and its copy

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """As many as OMP_NUM_THREADS allows, else the cores this process may use (at most 8)."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    if allowed.isdecimal() and int(allowed) > 0:
        return min(int(allowed), MAX_WORKERS)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_WORKERS)


def run(
    work: Callable[[Item], Result], items: Sequence[Item], side: Callable[[Item], int], workers: int | None
) -> Iterator[tuple[Item, Result]]:
    """Apply a function to many items: large ones one by one, then the others on several threads.

    Threads suffice because BLAS and LAPACK run without the interpreter's lock. BLAS uses all workers for a large item
    and one thread for each of the others.

    Args:
        work: the function.
        items: the items, in the order in which they are started.
        side: the size of an item; from LARGE_SIDE on it is large.
        workers: number of threads, at least 1; None is `default_workers`.

    Yields:
        (item, result) in the order in which they are done.

    Raises:
        UsageError: fewer than one worker.
    """
    load()  # SciPy has a BLAS of its own: the limits below bind what is loaded by then
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise UsageError(f"workers: got {workers}, expected at least 1")
    large = [item for item in items if side(item) >= LARGE_SIDE]
    small = [item for item in items if side(item) < LARGE_SIDE]
    with threadpool_limits(workers, user_api="blas"):
        for item in large:
            yield item, work(item)
    with threadpool_limits(1, user_api="blas"):
        if workers == 1:
            for item in small:
                yield item, work(item)
            return
        with ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(work, item): item for item in small}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)

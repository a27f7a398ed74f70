"""BLAS and LAPACK routines on parts of arrays, in place.

SciPy's own wrappers copy whatever is not contiguous, and most of them hold the interpreter's lock while they run, so
that other workers wait. The pointers are those that SciPy hands to compiled callers (`scipy.linalg.cython_blas` and
`cython_lapack`); called like this a routine works on any part of a matrix and leaves the lock free.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

REAL = {np.dtype(np.float32): ("s", ctypes.c_float), np.dtype(np.float64): ("d", ctypes.c_double)}


def call(name: str, dtype: Any, *arguments: bytes | int | float | np.ndarray) -> None:
    """Run a routine of BLAS or LAPACK in place. Nothing is checked: the arguments must be those of its documentation.

    Args:
        name: the routine without its first letter, such as "syrk".
        dtype: float32 or float64, which decides that letter.
        arguments: every argument of the routine in its order: a letter as bytes, an integer, a real number, or an
            array. An array may be a view and stands for the address of its first entry; its leading dimension (`lead`)
            is an argument of its own. `info` and other arrays of integers come from `integers`.
    """
    letter, real = REAL[np.dtype(dtype)]
    function, integer = _routine(letter + name), _integer()
    held: list[Any] = []
    for argument in arguments:
        match argument:
            case np.ndarray():
                held.append(ctypes.c_void_p(argument.__array_interface__["data"][0]))
            case bytes():
                held.append(ctypes.c_char_p(argument))
            case float():
                held.append(ctypes.byref(real(argument)))
            case _:
                held.append(ctypes.byref(integer(argument)))
    function(*held)


def lead(part: np.ndarray) -> int:
    """The leading dimension of a matrix in Fortran order, or of a part of one."""
    return max(part.strides[1] // part.itemsize, *part.shape[:1], 1)  # (the stride of a single column may be anything)


def integers(size: int, value: int = 0) -> np.ndarray:
    """An array of the routines' integers."""
    return np.full(size, value, np.dtype(_integer()))


@functools.cache
def _routine(name: str) -> Callable[..., None]:
    capsule, signature = _capsule(name)
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None)(pointer_of(capsule, signature))


@functools.cache
def _integer() -> Any:
    """The C type of the routines' integers."""
    return ctypes.c_int if b" int *" in _capsule("dgemm")[1] else ctypes.c_int64


def _capsule(name: str) -> tuple[Any, bytes]:
    """The capsule that holds a routine's address, and the C signature it is labelled with."""
    known = _extension("cython_blas").__pyx_capi__
    capsule = known[name] if name in known else _extension("cython_lapack").__pyx_capi__[name]
    name_of = ctypes.pythonapi.PyCapsule_GetName
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    return capsule, name_of(capsule)


@functools.cache
def _extension(name: str) -> Any:
    """scipy.linalg's extension module of that name, loaded without the package around it where that is not loaded yet.

    (The package loads numpy.f2py, numpy.testing and more, which takes as long as ten matrices of 576 x 576.)
    """
    full = f"scipy.linalg.{name}"
    if "scipy.linalg" not in sys.modules and full not in sys.modules:
        import scipy

        spec = importlib.machinery.PathFinder.find_spec(full, [f"{folder}/linalg" for folder in scipy.__path__])
        if spec is not None and spec.loader is not None:
            module = sys.modules[full] = importlib.util.module_from_spec(spec)  # where a later import will find it
            spec.loader.exec_module(module)
            return module
    return sys.modules.get(full) or importlib.import_module(full)


def load() -> None:
    """Load SciPy's BLAS and LAPACK, so that limits on threads bind them."""
    _integer()
    _extension("cython_lapack")

"""htsr: how heavy-tailed a transformer's layers are.

    result = htsr.scan("demo")
    result.blocks, result.table(rule="lod", gamma=5), result.plot.alpha()

Names are imported when they are first used: `import htsr` loads neither torch nor pandas. How results show themselves
in a notebook is attached from up here, so that numbers know nothing of pictures.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htsr.numerics.powerlaw import PowerLawFit as PowerLawFit
    from htsr.numerics.powerlaw import fit_power_law as fit_power_law
    from htsr.numerics.spectrum import eigenvalues as eigenvalues
    from htsr.probability import LayerTable as LayerTable
    from htsr.result import ScanResult as ScanResult
    from htsr.result import compare as compare
    from htsr.scanner import scan as scan
    from htsr.store import load_scan as load_scan

__version__ = "0.1.0"

_HOMES = {
    "LayerTable": "htsr.probability",
    "PowerLawFit": "htsr.numerics.powerlaw",
    "ScanResult": "htsr.result",
    "compare": "htsr.result",
    "eigenvalues": "htsr.numerics.spectrum",
    "fit_power_law": "htsr.numerics.powerlaw",
    "load_scan": "htsr.store",
    "scan": "htsr.scanner",
}
__all__ = sorted(["__version__", *_HOMES])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'htsr' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


_VIEWS = {"probability": ("LayerTable", "table_html"), "result": ("ScanResult", "notebook_html")}  # of htsr.report


def _view(function: str) -> Any:
    def _repr_html_(self: Any) -> str:
        return str(getattr(importlib.import_module("htsr.report"), function)(self))

    return _repr_html_


class _Package(types.ModuleType):
    """What happens when a submodule is imported and its name bound here.

    `htsr.scan` stays the function whoever imports first, and the results of a module get their view.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VIEWS and isinstance(value, types.ModuleType):
            kind, function = _VIEWS[name]
            getattr(value, kind)._repr_html_ = _view(function)
        if name in _HOMES and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

"""htsr: how heavy-tailed a transformer's layers are.

    result = htsr.scan("demo")
    result.blocks, result.table(rule="lod", gamma=5), result.plot.alpha()

Names are imported when they are first used: `import htsr` loads neither torch nor pandas.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htsr.comparison import compare as compare
    from htsr.layer_table import LayerTable as LayerTable
    from htsr.numerics.powerlaw import PowerLawFit as PowerLawFit
    from htsr.numerics.powerlaw import fit_power_law as fit_power_law
    from htsr.numerics.spectrum import eigenvalues as eigenvalues
    from htsr.result import ScanResult as ScanResult
    from htsr.result import load_scan as load_scan
    from htsr.scanner import scan as scan

__version__ = "0.1.0"

_MODULES = {
    "LayerTable": "htsr.layer_table",
    "PowerLawFit": "htsr.numerics.powerlaw",
    "ScanResult": "htsr.result",
    "compare": "htsr.comparison",
    "eigenvalues": "htsr.numerics.spectrum",
    "fit_power_law": "htsr.numerics.powerlaw",
    "load_scan": "htsr.result",
    "scan": "htsr.scanner",
}
__all__ = sorted(["__version__", *_MODULES])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'htsr' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

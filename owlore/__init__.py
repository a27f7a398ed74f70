"""owlore: fine-tune a causal language model a few blocks at a time.

`owlore.train(model, data, ...)` is the Python form of `owlore train`. Importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owlore import sampling
    from owlore.run.api import train
    from owlore.run.result import Run

__version__ = "0.1.0"
_DEFINED_IN = {"Run": "owlore.run.result", "train": "owlore.run.api"}
__all__ = ["Run", "__version__", "sampling", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "sampling":
        return import_module("owlore.sampling")
    if name in _DEFINED_IN:
        return getattr(import_module(_DEFINED_IN[name]), name)
    raise AttributeError(f"module 'owlore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

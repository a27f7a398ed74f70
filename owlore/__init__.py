"""owlore: fine-tune a causal language model a few blocks at a time.

`owlore.train(model, data, ...)` is the Python form of `owlore train`. Importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owlore import sampling
    from owlore.train.record import Run
    from owlore.train.run import train

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "sampling", "train"]


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for (PEP 562)."""
    match name:
        case "train" | "sampling":
            return import_module(f"owlore.{name}")
        case "Run":
            return import_module("owlore.train.record").Run
        case _:
            raise AttributeError(f"module 'owlore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""The training engine (it knows strategies, never methods by name), and the function `owlore.train`.

The package and the public function share a name. So that `owlore.train(...)` works whatever was imported before it,
the package itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owlore.train.record import Run


class _CallablePackage(ModuleType):
    def __call__(self, model: Any, data: Any, *, tokenizer: Any = None, table: Any = None, **settings: Any) -> Run:
        """Fine-tune a causal language model: see `owlore.train.run.train`; settings are those of `owlore train`."""
        from owlore.train.run import train

        return train(model, data, tokenizer=tokenizer, table=table, **settings)


sys.modules[__name__].__class__ = _CallablePackage

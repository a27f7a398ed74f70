"""Evaluation of a model on common tasks with lm-evaluation-harness, in two protocols.

`owlore.evaluation.evaluate(model, tokenizer, tasks, ...)` is the Python form of `owlore eval`. Importing this package
imports neither torch nor lm_eval.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owlore.evaluation.run import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    """Import `evaluate` on first use (PEP 562)."""
    if name == "evaluate":
        from owlore.evaluation.run import evaluate

        return evaluate
    raise AttributeError(f"module 'owlore.evaluation' has no attribute {name!r}")

"""The names of the methods, for whoever must not import torch to know them; `owlore.strategies` has the methods."""

from __future__ import annotations

METHODS = (
    "owlore", "lisa", "lisa-d", "grass", "badam", "galore", "full", "lora", "dora", "smt", "dota", "qdota",
)  # fmt: skip

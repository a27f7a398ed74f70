"""The words that options take, for modules that must not import torch; the modules that implement them import these."""

from __future__ import annotations

METHODS = (
    "owlore", "lisa", "lisa-d", "grass", "badam", "galore", "full", "lora", "dora", "smt", "dota", "qdota",
)  # fmt: skip
GROUPS = ("embeddings", "norm", "head")  # parameters outside the blocks
DRAWS = ("exact", "sequential", "cyclic", "shuffled")
ON_SWITCH = ("drop", "host", "keep")
SCHEDULES = ("linear", "cosine", "constant")
STATE_BITS = (32, 8)
FROZEN = ("bf16", "int8", "nf4")
DTYPES = ("float32", "bfloat16", "float16")
FIRA, APOLLO = ("fira",), ("apollo", "apollo-mini")  # updates of full rank that are made of a projected one
SMT_SELECTIONS = ("gradient", "magnitude", "random", "diagonal")
SMT_CRITERIA = ("mean_of_abs", "abs_of_mean", "mean_square")
SMT_ALLOTMENTS = ("global", "per_matrix")
DOTA_INITS = ("mpo", "random")
DOTA_RESIDUALS = ("implicit", "explicit")

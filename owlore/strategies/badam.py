"""BAdam: block coordinate descent with Adam inside."""

from __future__ import annotations

from owlore.strategies.base import Sampled


class BAdam(Sampled):
    """One block after another, AdamW with an fp32 master of that block alone, state cleared at each switch.

    Reference: Luo et al. 2024, "BAdam", arXiv 2404.02827, algorithm 1; embeddings and head stay frozen.
    """

    name = "badam"
    paper = "arXiv 2404.02827"
    summary = "one block at a time in cyclic or shuffled order, AdamW, everything else frozen"
    share = "one of L blocks"
    memory = "weights + AdamW state of one block"
    defaults = {"active": 1, "draw": "shuffled"}
    preset = {**defaults, "every": 100}  # the paper: min(max(rows / (batch * blocks), 50), 100)

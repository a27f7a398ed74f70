"""LISA and its depth-weighted control: sampled blocks, plain AdamW."""

from __future__ import annotations

from owlore.choices import GROUPS
from owlore.strategies.base import Sampled


class Lisa(Sampled):
    """Draw gamma blocks uniformly every K steps; embeddings, norm and head are trained throughout.

    Reference: Pan et al. 2024, "LISA: Layerwise Importance Sampling for Memory-Efficient LLM Fine-Tuning",
    arXiv 2403.17919, algorithm 1. Deviation: state of blocks that leave is freed, which the published memory figures
    presuppose and the published callback does not do.
    """

    name = "lisa"
    paper = "arXiv 2403.17919"
    summary = "gamma blocks drawn uniformly every K steps, AdamW, embeddings and head always on"
    share = "gamma of L blocks and what is always on"
    memory = "weights + AdamW state of gamma blocks and of what is always on"
    defaults = {"active": 2, "every": 20, "always_on": GROUPS}
    preset = defaults


class LisaD(Lisa):
    """LISA with probabilities falling linearly with depth (L..1): the control that OwLore's reviewers asked for."""

    name = "lisa-d"
    summary = "LISA with draw probabilities falling linearly with depth"
    table = "decrease"

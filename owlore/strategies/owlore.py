"""OwLore: blocks drawn by a layer table, gradients projected to low rank."""

from __future__ import annotations

from owlore.choices import GROUPS
from owlore.strategies.base import LOW_RANK, PROJECTION, SAMPLING, Sampled


class OwLore(Sampled):
    """Draw gamma blocks every K steps with the table's probabilities and train them by GaLore.

    Reference: Li et al. 2024, "OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection", arXiv 2405.18380.
    Deviations, each on purpose: inclusion probabilities are exact (the paper's code draws successively, `--draw
    sequential`); a probability above 1 is capped and the rest rescaled; moments and bases of blocks that leave are
    freed instead of kept stale; 16-bit weights have fp32 masters while drawn; nothing outside the blocks is trained
    unless asked (`--preset paper` trains embeddings, norm and head).
    """

    name = "owlore"
    paper = "arXiv 2405.18380"
    summary = "gamma blocks drawn by the layer table every K steps, gradients projected to rank r"
    share = "gamma of L blocks"
    memory = "weights + rank-r state of gamma blocks"
    table = "auto"
    accepted_options = SAMPLING | PROJECTION
    method_options = LOW_RANK
    preset = {
        "always_on": GROUPS,
        "active": 5,
        "every": 50,
        "rank": 128,
        "scale": 1.0,
        "lr": 3e-4,
        "batch": 16,
        "seq_len": 512,
        "schedule": "linear",
        "warmup": 0,
        "weight_decay": 0.0,
        "clip": 1.0,
    }

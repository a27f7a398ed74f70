"""GaLore: all blocks, gradients projected to low rank."""

from __future__ import annotations

from owlore.choices import GROUPS
from owlore.strategies.base import LOW_RANK, PROJECTION, Strategy


class GaLore(Strategy):
    """Every matrix inside the blocks is trained through its own projection, refreshed every `refresh` steps.

    Reference: Zhao et al. 2024, "GaLore", arXiv 2403.03507, algorithm 2. Deviations: moments are rotated into the new
    basis at a refresh (`moments=keep` leaves them, as published); accumulation and clipping are allowed, in the
    projected space. `galore-torch` adds eps to the second moment's root before its bias is corrected, we after.
    """

    name = "galore"
    paper = "arXiv 2403.03507"
    summary = "all blocks, gradients projected to rank r, basis refreshed every N steps"
    share = "all blocks, through rank r"
    memory = "weights + rank-r state of all blocks"
    accepted_options = PROJECTION
    method_options = LOW_RANK
    defaults = {"refresh": 200, "scale": 0.25, "always_on": GROUPS}
    preset = {**defaults, "rank": 128}

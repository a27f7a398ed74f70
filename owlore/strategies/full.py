"""Full fine-tuning with AdamW: the yardstick."""

from __future__ import annotations

from owlore.choices import GROUPS
from owlore.strategies.base import Strategy


class Full(Strategy):
    """Every block and every group outside them, AdamW with fp32 masters for 16-bit weights."""

    name = "full"
    paper = "Loshchilov & Hutter 2019, arXiv 1711.05101"
    summary = "all parameters, AdamW"
    share = "all"
    memory = "weights + AdamW state of all parameters"
    defaults = {"always_on": GROUPS}

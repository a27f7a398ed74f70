"""Where the blocks of a run are stored and in which format: the settings, and whether the run streams."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where frozen blocks are stored.

    Attributes:
        residency: `device`, or `host`, from which blocks are copied for each visit.
        resident_share: with `host` the share of blocks in [0, 1), from the top, that stays on the device.
        frozen: format of frozen blocks: `bf16` keeps their own bits, `int8` and `nf4` are lossy.
        offload: whether the hidden states between blocks are kept in host memory.
    """

    residency: str = "device"
    resident_share: float = 0.0
    frozen: str = "bf16"
    offload: bool = False

    @property
    def streams(self) -> bool:
        """Whether blocks are visited one by one instead of lying on the device as they are."""
        return self.residency == "host" or self.frozen != "bf16" or self.offload

    def resident_blocks(self, num_blocks: int) -> range:
        """The blocks that stay on the device: the top ones, which a step visits twice."""
        share = self.resident_share if self.residency == "host" else 1.0
        return range(num_blocks - math.floor(share * num_blocks + 1e-9), num_blocks)

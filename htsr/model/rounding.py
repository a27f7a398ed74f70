"""Whether the calibration text may run in bfloat16: where the device multiplies it in hardware, and after a check.

bfloat16 products are several times faster there, but rounding moves input norms, and a norm moves outliers across
their limit. So the first windows run in both precisions, block by block in one walk, and the text runs in bfloat16
only if no block's share of the table moved by more than `MOST_SHARE`. The whole text is to agree within one percent;
it moved by up to 1.4 times what the first windows did (all-MiniLM-L6-v2: 0.15 % and 0.21 %; SmolLM2-135M: 0.51 % and
0.34 %), hence the limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from htsr.model.outlier_pooling import Outliers
from htsr.numerics.bf16 import cpu_flags

PROBE_WINDOWS = 2
MOST_SHARE = 0.007  # of a block's share of the table, relative
MOST_LOD = 0.01  # of its LOD: where one moves that far the rest need not be looked at
FEWEST = 200  # outliers of a block: with fewer, one that crosses the limit is half a percent
WORTHWHILE = 8  # windows from which bfloat16 saves more than the probe costs
UNITS = ("avx512_bf16", "amx_bf16")  # as Linux reports them; without, bfloat16 is emulated and slow


@dataclass(frozen=True)
class Rounding:
    """The precision that the calibration text runs in.

    Attributes:
        why: why this one.
        dtype: of the products of matrices.
    """

    why: str
    dtype: torch.dtype = torch.float32

    def record(self) -> dict[str, Any]:
        """The part that scan.json stores."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "why": self.why}


def has_bf16_units(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not cpu_flags().isdisjoint(UNITS)


def judge(blocks: Iterable[tuple[int, Outliers, Outliers]]) -> Rounding:
    """Decide whether the text may run in bfloat16.

    Args:
        blocks: for each block its number of weights and its outliers on the probe's windows, in float32 and in
            bfloat16. The first block that has too few outliers, or whose LOD moves too far, ends the iteration.

    Returns:
        The precision and why.
    """
    exact, rounded = [], []
    for block, (size, true, got) in enumerate(blocks):
        exact.append(true.lod)
        rounded.append(got.lod)
        if not (count := true.lod / 100 * size) >= FEWEST:
            return Rounding(f"block {block} has {count:.0f} outliers, too few to see a change of {MOST_SHARE:.1%}")
        change = relative_change(true.lod, got.lod)
        if not change <= MOST_LOD:
            return Rounding(f"in bfloat16 the LOD of block {block} moves by {change:.2%}, more than {MOST_LOD:.1%}")
    changes = [relative_change(a / sum(exact), b / sum(rounded)) for a, b in zip(exact, rounded, strict=True) if a]
    largest = max(changes, default=0.0)
    if not largest <= MOST_SHARE:
        return Rounding(f"in bfloat16 a block's share of the table moves by {largest:.2%}, more than {MOST_SHARE:.1%}")
    why = f"on the first windows no block's share of the table is further than {largest:.2%} from float32's"
    return Rounding(why, dtype=torch.bfloat16)


def relative_change(true: float, got: float) -> float:
    """|got - true| / true; 0 for equal numbers, infinite where only the true one is 0, NaN with NaN."""
    if got == true:
        return 0.0
    return abs(got - true) / true if true else float("inf")

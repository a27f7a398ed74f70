"""Literal transcriptions of the papers' formulas: slow, plain, and the oracle of the tests."""

from __future__ import annotations

from collections.abc import Sequence

# OwLore's metric_cache/llama2_7b_ratio_13.txt (LLaMA-2-7B, tau = 13, percent): the only table its authors shipped.
LLAMA2_7B_LOD_TAU13 = (
    0.2678090427, 0.2952778278, 0.1274385601, 0.1144503065, 0.0987532225, 0.0883675610, 0.0878427930, 0.0837711473,
    0.0801417494, 0.0721763453, 0.0706563959, 0.0696483671, 0.0629597995, 0.0590793827, 0.0552216960, 0.0537150882,
    0.0468273855, 0.0392315919, 0.0335851482, 0.0339755123, 0.0315913265, 0.0278769379, 0.0278443252, 0.0229400674,
    0.0254255502, 0.0209235157, 0.0242104802, 0.0181805902, 0.0183762664, 0.0208518666, 0.0240681703, 0.0824612039,
)  # fmt: skip


def water_filling(scores: Sequence[float], gamma: float, floor: float = 0.0) -> list[float]:
    """pi = min(1, max(floor, c * score)) with sum gamma, the level c found by bisection."""
    level = [0.0, 1.0 / min(s for s in scores if s > 0)]
    for _ in range(200):
        c = sum(level) / 2
        pi = [min(1.0, max(floor, c * s)) for s in scores]
        level[sum(pi) >= gamma] = c
    return pi

"""The methods, one file each; none imports another."""

from __future__ import annotations

from owlore.strategies.badam import BAdam
from owlore.strategies.base import PeriodLog, PeriodStats, PrepareContext, Strategy, StrategyConfig
from owlore.strategies.dota import DoTA, QDoTA
from owlore.strategies.full import Full
from owlore.strategies.galore import GaLore
from owlore.strategies.grass import Grass
from owlore.strategies.lisa import Lisa, LisaD
from owlore.strategies.lora import DoRA, LoRA
from owlore.strategies.owlore import OwLore
from owlore.strategies.smt import SMT

STRATEGIES: dict[str, type[Strategy]] = {
    cls.name: cls for cls in (OwLore, Lisa, LisaD, Grass, BAdam, GaLore, Full, LoRA, DoRA, SMT, DoTA, QDoTA)
}

__all__ = ["STRATEGIES", "PeriodLog", "PeriodStats", "PrepareContext", "Strategy", "StrategyConfig"]

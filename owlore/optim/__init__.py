"""The rotating optimizer: state lives and dies with activation."""

from owlore.optim.rotating import RotatingOptimizer, Switch
from owlore.optim.slot import Rule, Weights

__all__ = ["RotatingOptimizer", "Rule", "Switch", "Weights"]

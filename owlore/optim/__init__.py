"""The rotating optimizer: state lives and dies with activation."""

from owlore.optim.parameter_state import MasterPolicy, UpdateSpec
from owlore.optim.rotating import RotatingOptimizer, Switch

__all__ = ["MasterPolicy", "RotatingOptimizer", "Switch", "UpdateSpec"]

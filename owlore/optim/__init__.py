"""The rotating optimizer: it holds state for the active parameters alone."""

from owlore.optim.rotating import RotatingOptimizer, Switch
from owlore.optim.update_spec import MasterPolicy, UpdateSpec

__all__ = ["MasterPolicy", "RotatingOptimizer", "Switch", "UpdateSpec"]

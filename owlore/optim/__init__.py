"""The rotating optimizer: state lives and dies with activation."""

from owlore.optim.rotating import RotatingOptimizer, Switch
from owlore.optim.update_spec import MasterPolicy, UpdateSpec

__all__ = ["MasterPolicy", "RotatingOptimizer", "Switch", "UpdateSpec"]

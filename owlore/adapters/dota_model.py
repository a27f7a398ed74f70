"""DoTA and QDoTA as a PEFT tuner.

Reference: DoTA (arXiv 2412.20891). Deviations, as the paper gives no code, shapes or targets: the residual is implicit
by default; factors, bonds, gauge and padding are defined in `owlore.kernels.mpo`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from owlore.adapters.base import LinearTuner
from owlore.adapters.dota_config import DotaConfig
from owlore.adapters.dota_layer import DotaLayer
from owlore.adapters.targets import count_2d, find_targets
from owlore.kernels.mpo import largest_bond


class DotaModel(LinearTuner):
    """PEFT's tuner of DoTA; it resolves a density to a bond."""

    prefix = "dota_"
    tuner_layer_cls = DotaLayer

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        peft_config.bond = bond_of(model, peft_config)

    def adapt(self, target: nn.Module, name: str, adapter_name: str, config: DotaConfig) -> nn.Module:
        """A `DotaLayer` around the target."""
        layer = target if isinstance(target, DotaLayer) else DotaLayer(target, name)
        layer.update_layer(adapter_name, config)
        return layer


def bond_of(model: nn.Module, config: DotaConfig) -> int:
    """The bond of a configuration: its `bond`, or the largest within its density."""
    if config.density is None or not config.fresh:
        return config.bond
    sides = [target.shape for target in find_targets(model, config)]
    return largest_bond(sides, config.num_cores, int(config.density * count_2d(model)), config.cuts)

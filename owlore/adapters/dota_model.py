"""DoTA and QDoTA as PEFT tuners.

Reference: DoTA (arXiv 2412.20891). Deviations (the paper gives no code, shapes or targets): the implicit residual by
default; factors, bonds, gauge and padding are ours.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from owlore.adapters.dota_config import DotaConfig
from owlore.adapters.dota_layer import DotaLayer
from owlore.adapters.targets import DEFAULT_TARGETS, count_2d, find_targets
from owlore.kernels.mpo import largest_bond


class DotaModel(BaseTuner):
    prefix = "dota_"
    tuner_layer_cls = DotaLayer
    target_module_mapping = DEFAULT_TARGETS

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        peft_config.bond = bond_of(model, peft_config)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, DotaLayer) else DotaLayer(target, current_key)
        layer.update_layer(adapter_name, peft_config)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)


def bond_of(model: nn.Module, config: DotaConfig) -> int:
    """The bond of a configuration: its own, or the largest within its density."""
    if config.density is None or not config.fresh:
        return config.bond
    sides = [target.shape for target in find_targets(model, config)]
    return largest_bond(sides, config.num_cores, int(config.density * count_2d(model)), config.cuts)

"""DoTA and QDoTA as PEFT tuners.

Reference: DoTA (arXiv 2412.20891). Deviations (the paper gives no code, shapes or targets): the implicit residual by
default; factors, bonds, gauge and padding are ours.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from owlore.adapters.dota_layer import DotaLayer
from owlore.adapters.targets import DEFAULT_TARGETS, count_2d, find_targets
from owlore.kernels.mpo import largest_bond


class DotaModel(BaseTuner):
    prefix = "dota_"
    tuner_layer_cls = DotaLayer
    target_module_mapping = DEFAULT_TARGETS

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.density is not None and peft_config.fresh:
            sides = [target.shape for target in find_targets(model, peft_config)]
            limit = int(peft_config.density * count_2d(model))
            peft_config.bond = largest_bond(sides, peft_config.num_cores, limit, peft_config.cuts)

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

"""SMT as a PEFT tuner: resolves the block map and puts an `SmtLayer` around every matrix that has a block.

Reference: He et al. 2025, Sparse Matrix Tuning (arXiv 2405.15525). Deviations: the warm-up that scores blocks trains
nothing (there, 100 full fine-tuning steps stay in the weights); the default map is the diagonal of DiaBlo (arXiv
2506.03230); matrices without a block stay as they are.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from owlore.adapters.selection import make_map
from owlore.adapters.smt_config import SmtConfig
from owlore.adapters.smt_layer import SmtLayer
from owlore.adapters.targets import DEFAULT_TARGETS, find_targets, is_shared


class SmtModel(BaseTuner):
    prefix = "smt_"
    tuner_layer_cls = SmtLayer
    target_module_mapping = DEFAULT_TARGETS

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.block_map is None:
            peft_config.block_map = make_map(model, peft_config)
        check_map(peft_config.block_map, model, peft_config)

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
        cells = peft_config.block_map["blocks"].get(current_key)
        if not cells:
            return
        # In place, blocks of a head tied to the embeddings would change what the embeddings look up.
        mode = "bypass" if peft_config.mode == "auto" and is_shared(self.model, target) else peft_config.mode
        layer = target if isinstance(target, SmtLayer) else SmtLayer(target, mode)
        layer.update_layer(
            adapter_name, peft_config.block_map["block_size"], cells, inference_mode=peft_config.inference_mode
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)


def check_map(block_map: Any, model: nn.Module, config: SmtConfig) -> None:
    """Raises: ValueError for a map of another form, without blocks, or with a module that is no target."""
    form = '{"block_size": int, "blocks": {module name: [[i, j], ...]}}'
    if not (isinstance(block_map, dict) and set(block_map) == {"block_size", "blocks"} and block_map["blocks"]):
        raise ValueError(f"got block_map={block_map!r}, expected {form} with at least one block")
    known = {target.name for target in find_targets(model, config)}
    foreign = sorted(set(block_map["blocks"]) - known)
    if foreign:
        raise ValueError(
            f"block_map names {foreign[0]!r}, which is no target module of this model: expected names like "
            f"{min(known)!r} (the map belongs to another model or other target_modules)"
        )

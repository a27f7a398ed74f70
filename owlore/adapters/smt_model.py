"""SMT as a PEFT tuner: resolves the block map and puts an `SmtLayer` around every matrix that has a block.

Reference: He et al. 2025, Sparse Matrix Tuning (arXiv 2405.15525). Deviations: the warm-up that scores blocks trains
nothing (in the paper the weights keep its 100 steps of full fine-tuning); the default map is the diagonal of DiaBlo
(arXiv 2506.03230); matrices without a block are left as they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from owlore.adapters.base import LinearTuner
from owlore.adapters.selection import make_map
from owlore.adapters.smt_config import SmtConfig
from owlore.adapters.smt_layer import SmtLayer
from owlore.adapters.targets import find_targets, is_shared


class SmtModel(LinearTuner):
    """PEFT's tuner of SMT; it fills in the block map of a configuration that has none."""

    prefix = "smt_"
    tuner_layer_cls = SmtLayer

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.block_map is None:
            peft_config.block_map = make_map(model, peft_config)
        check_map(peft_config.block_map, model, peft_config)

    def adapt(self, target: nn.Module, name: str, adapter_name: str, config: Any) -> nn.Module:
        """An `SmtLayer` around the target if the block map has blocks of it, else the target."""
        cells = config.block_map["blocks"].get(name)
        if not cells:
            return target
        # Blocks written into a head that is tied to the embeddings would change the embeddings too.
        mode = "bypass" if config.mode == "auto" and is_shared(self.model, target) else config.mode
        layer = target if isinstance(target, SmtLayer) else SmtLayer(target, mode)
        layer.update_layer(adapter_name, config.block_map["block_size"], cells, inference_mode=config.inference_mode)
        return layer


def check_map(block_map: Any, model: nn.Module, config: SmtConfig) -> None:
    """Check a block map against the model.

    Raises:
        ValueError: The map has another form, no blocks, or a module that is not a target.
    """
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

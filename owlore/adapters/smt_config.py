"""The PEFT configuration of Sparse Matrix Tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from owlore.adapters.base import LinearConfig, one_of
from owlore.kernels.block_scores import CRITERIA

SELECTIONS = {
    "diagonal": "blocks on the diagonal of each matrix (DiaBlo, arXiv 2506.03230)",
    "random": "blocks drawn by the seed",
    "magnitude": "blocks with the largest mean |w|",
    "gradient": "blocks with the largest gradients during a frozen warm-up: block_map from select_blocks",
}
ALLOTMENTS = {
    "global": "the blocks with the highest scores in all matrices; a matrix may get none",
    "per_matrix": "the same number of blocks for every matrix",
}
MODES = {
    "auto": "in place for plain float weights, bypass for quantised or tied ones",
    "inplace": "the blocks are written into the weight: a dense layer, no extra work",
    "bypass": "the weight is not changed and the blocks' product is added",
}


@dataclass
class SmtConfig(LinearConfig):
    """Sparse Matrix Tuning (arXiv 2405.15525): trained dense deltas on chosen square blocks of the target matrices.

    Args:
        target_modules: Names or a regular expression, as everywhere in PEFT; None takes PEFT's choice for the model
            type.
        block_size: Side of a block, at least 1; it is halved until the budget has a block for every target matrix.
        density: Share of the model's 2-D parameters that is trained, in (0, 1].
        selection: How the blocks are chosen, one of `SELECTIONS`.
        block_map: {"block_size": l, "blocks": {module name: [[i, j], ...]}}. It takes precedence over block_size,
            density and selection. If None it is filled in when the adapter is made, so that a saved configuration
            always has it.
        criterion: How `select_blocks` scores gradients, one of `owlore.kernels.block_scores.CRITERIA`.
        allotment: How the budget is divided, one of `ALLOTMENTS`; None is per_matrix for the diagonal, else global.
        mode: How the deltas enter the layer, one of `MODES`.
        seed: Seed of the random selection.
        exclude_modules: Names or a regular expression of modules that are left out of the targets.
        layers_to_transform: Indexes of the blocks whose modules are targets; None takes all.
        layers_pattern: Name of the module list that `layers_to_transform` refers to.
        modules_to_save: Further modules that are trained and saved.
        bias: "none", the only choice: biases stay frozen.
        task_type, peft_type, auto_mapping, peft_version, base_model_name_or_path, revision, inference_mode: As in
            `peft.PeftConfig`.

    Raises:
        ValueError: A field has a value that is not allowed.
    """

    block_size: int = 256
    density: float = 0.0084
    selection: str = "diagonal"
    block_map: dict[str, Any] | None = None
    criterion: str = "mean_of_abs"
    allotment: str | None = None
    mode: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "SMT"
        one_of("selection", self.selection, SELECTIONS)
        one_of("criterion", self.criterion, CRITERIA)
        one_of("mode", self.mode, MODES)
        one_of("allotment", self.allotment, [None, *ALLOTMENTS])
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}: expected at least 1")
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density}: expected a share of the model's 2-D parameters in (0, 1]")

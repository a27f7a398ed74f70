"""The configuration of Sparse Matrix Tuning as PEFT sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

SELECTIONS = {
    "diagonal": "blocks on the diagonal of each matrix (DiaBlo, arXiv 2506.03230)",
    "random": "blocks drawn by the seed",
    "magnitude": "blocks with the largest mean |w|",
    "gradient": "blocks with the largest gradients during a frozen warm-up: block_map from select_blocks",
}
ALLOTMENTS = {
    "global": "the best blocks wherever they lie; a matrix may get none",
    "per_matrix": "the same number of blocks for every matrix",
}
MODES = {
    "auto": "in place for plain float weights, bypass for quantised or tied ones",
    "inplace": "the blocks are written into the weight: a dense layer, no extra work",
    "bypass": "the weight stays untouched and the blocks' product is added",
}


@dataclass
class SmtConfig(PeftConfig):
    """Sparse Matrix Tuning (arXiv 2405.15525): dense deltas on chosen square blocks of the target matrices.

    target_modules: names or a regular expression as everywhere in PEFT; None takes PEFT's choice for the model type.
    block_size: side of a block; halved until the budget holds a block per target matrix.
    density: share of all 2-D parameters of the model that is trained, in (0, 1].
    selection: see `SELECTIONS`. criterion: how `select_blocks` scores gradients, see `owlore.kernels.block_scores`.
    allotment: see `ALLOTMENTS`; None is per_matrix for the diagonal, global otherwise.
    mode: see `MODES`. seed: of random selection.
    block_map: {"block_size": l, "blocks": {module name: [[i, j], ...]}}; filled in when the adapter is made, so a saved
    configuration always holds it, and given by hand it wins over block_size, density and selection.
    """

    target_modules: list[str] | set[str] | str | None = None
    block_size: int = 256
    density: float = 0.0084
    selection: str = "diagonal"
    block_map: dict[str, Any] | None = None
    criterion: str = "mean_of_abs"
    allotment: str | None = None
    mode: str = "auto"
    seed: int = 0
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = field(default="none", metadata={"help": "Kept for PEFT; biases stay frozen."})

    def __post_init__(self) -> None:
        from owlore.kernels.block_scores import CRITERIA

        super().__post_init__()
        self.peft_type = "SMT"
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        one_of("selection", self.selection, SELECTIONS)
        one_of("criterion", self.criterion, CRITERIA)
        one_of("mode", self.mode, MODES)
        one_of("bias", self.bias, ["none"])
        if self.allotment is not None:
            one_of("allotment", self.allotment, ALLOTMENTS)
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}: expected at least 1")
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density}: expected a share of the model's 2-D parameters in (0, 1]")


def one_of(name: str, value: Any, known: Any) -> None:
    """Raises: ValueError when `value` is none of the known ones."""
    if value not in known:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")

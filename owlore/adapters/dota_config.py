"""The PEFT configuration of DoTA and QDoTA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from owlore.adapters.base import LinearConfig, one_of
from owlore.kernels.mpo import GAUGES

INITS = {
    "mpo": "the truncated matrix product operator of the pre-trained weight",
    "random": "Gaussian cores whose product has that operator's norm, as a control",
}
RESIDUALS = {
    "implicit": "W0 + MPO(c) - MPO(c0): the base weight is not changed and the first output has the base's bits",
    "explicit": "the base weight becomes W0 - MPO(c0)",
}


@dataclass
class DotaConfig(LinearConfig):
    """Weight-decomposed tensor adaptation (arXiv 2412.20891): a trained matrix product operator beside the weight.

    Args:
        target_modules: Names or a regular expression, as everywhere in PEFT; None takes PEFT's choice for the model
            type.
        num_cores: Number N of cores, at least 1.
        bond: Largest inner bond R, at least 1.
        density: Share of the model's 2-D parameters that is trained, in (0, 1], instead of `bond`: the largest bond
            within it is taken, and written into `bond`.
        init: First values of the cores, one of `INITS`.
        residual: What the first cores are subtracted from, one of `RESIDUALS`.
        quantise: "nf4" stores the base weight in four bits; with residual="explicit" that is QDoTA.
        alternations: Rounds of refitting the cores to W0 minus the quantised residual, at least 0 (LoftQ's idea, arXiv
            2310.08659).
        gauge: How singular values are distributed over the cores, see `owlore.kernels.mpo.decompose`.
        factors: {side: its factors} for sides that are not split by default.
        seed: Seed of random cores.
        fresh: Whether the cores are computed. It is False in a saved configuration: the cores come from the file.
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

    num_cores: int = 3
    bond: int = 16
    density: float | None = None
    init: str = "mpo"
    residual: str = "implicit"
    quantise: str | None = None
    alternations: int = 0
    gauge: str = "equal"
    factors: dict[str, list[int]] | None = None
    fresh: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "DOTA"
        if self.factors is not None:
            self.factors = {str(side): [int(f) for f in cut] for side, cut in self.factors.items()}
        one_of("init", self.init, INITS)
        one_of("residual", self.residual, RESIDUALS)
        one_of("quantise", self.quantise, [None, "nf4"])
        one_of("gauge", self.gauge, GAUGES)
        if self.num_cores < 1 or self.bond < 1 or self.alternations < 0:
            raise ValueError(
                f"num_cores={self.num_cores}, bond={self.bond}, alternations={self.alternations}: "
                "expected at least 1, 1 and 0"
            )
        if self.alternations and (self.quantise is None or self.residual == "implicit" or self.init == "random"):
            raise ValueError('alternations need quantise="nf4", residual="explicit" and init="mpo"')
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density={self.density}: expected a share of the model's 2-D parameters in (0, 1]")

    @property
    def cuts(self) -> dict[int, list[int]]:
        """`factors` with the sides as numbers, which JSON cannot have as keys."""
        return {int(side): cut for side, cut in (self.factors or {}).items()}

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved, with `fresh` False."""
        return super().to_dict() | {"fresh": False}

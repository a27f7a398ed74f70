"""The configuration of DoTA and QDoTA as PEFT sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from owlore.adapters.smt_config import one_of
from owlore.kernels.mpo import GAUGES

INITS = {
    "mpo": "the truncated matrix product operator of the pre-trained weight",
    "random": "Gaussian cores whose product has that operator's norm: the control",
}
RESIDUALS = {
    "implicit": "W0 + MPO(c) - MPO(c0): the base stays untouched and the first output is the base's, bit for bit",
    "explicit": "the base becomes W0 - MPO(c0)",
}


@dataclass
class DotaConfig(PeftConfig):
    """Weight-decomposed tensor adaptation (arXiv 2412.20891): a trained matrix product operator beside the weight.

    target_modules: names or a regular expression as everywhere in PEFT; None takes PEFT's choice for the model type.
    num_cores: N. bond: the largest inner bond R. density: the trained share of all 2-D parameters instead; the largest
    bond within it is taken (and written into `bond`). init: see `INITS`. residual: see `RESIDUALS`.
    quantise: "nf4" keeps the base in four bits; with residual="explicit" that is QDoTA. alternations: rounds of
    refitting the cores to W0 minus the quantised residual (0: none; LoftQ's idea, arXiv 2310.08659).
    gauge: see `owlore.kernels.mpo.decompose`. factors: {side: its factors} for sides that shall be cut otherwise.
    seed: of random cores. fresh: False in a saved configuration: the cores come from the file, nothing is decomposed.
    """

    target_modules: list[str] | set[str] | str | None = None
    num_cores: int = 3
    bond: int = 16
    density: float | None = None
    init: str = "mpo"
    residual: str = "implicit"
    quantise: str | None = None
    alternations: int = 0
    gauge: str = "equal"
    factors: dict[str, list[int]] | None = None
    seed: int = 0
    fresh: bool = True
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "DOTA"
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.factors is not None:
            self.factors = {str(side): [int(f) for f in cut] for side, cut in self.factors.items()}
        one_of("init", self.init, INITS)
        one_of("residual", self.residual, RESIDUALS)
        one_of("quantise", self.quantise, [None, "nf4"])
        one_of("gauge", self.gauge, GAUGES)
        one_of("bias", self.bias, ["none"])
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
        """`factors` with its sides as numbers, as JSON cannot write them."""
        return {int(side): cut for side, cut in (self.factors or {}).items()}

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"fresh": False}

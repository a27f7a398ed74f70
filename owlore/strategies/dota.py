"""DoTA and QDoTA: tensor-train cores of the weights themselves, trained beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from owlore.choices import DOTA_INITS, DOTA_RESIDUALS
from owlore.injection import InjectedAdapter
from owlore.options import MethodOption, choice, integer, number, targets
from owlore.strategies.adapter import AdapterStrategy
from owlore.strategies.base import PrepareContext

SHARE = 8  # the default bond keeps the cores below this part of the targets
OPTIONS = {
    "num_cores": MethodOption(3, integer(1), "Cores of each matrix; 1 is the dense matrix."),
    "bond": MethodOption(
        None, integer(1), "Largest inner bond; 16, or less where the cores would pass an eighth of W's size."
    ),
    "density": MethodOption(None, number(0, above=True, below=1), "Share of the 2-D parameters instead of `bond`."),
    "init": MethodOption("mpo", choice(*DOTA_INITS), "The weight's own decomposition, or the paper's control."),
    "target_modules": MethodOption("all-linear", targets(), "Linear maps that get cores, by name."),
}


class DoTA(AdapterStrategy):
    """W + MPO(c) - MPO(c0): the cores c begin as the weight's truncated matrix product operator c0, W stays frozen.

    Reference: Hu et al. 2024, "DoTA", arXiv 2412.20891. The paper's code, shapes, bonds and targets are not public:
    these defaults are ours and there is no `--preset paper`. Deviation: by default the residual is implicit, so that
    the first output is the base model's bit for bit; `residual=explicit` takes MPO(c0) out of the weights.
    """

    name = "dota"
    paper = "arXiv 2412.20891"
    summary = "tensor-train cores of the weights, begun as their own decomposition"
    share = "the cores: sum r o i r' values a matrix"
    memory = "weights + cores (twice, once frozen)"
    method_options = OPTIONS | {
        "residual": MethodOption("implicit", choice(*DOTA_RESIDUALS), "Whether W keeps MPO(c0) inside.")
    }
    fixed: ClassVar[dict[str, Any]] = {}

    @classmethod
    def adapter_config(cls, model: nn.Module, context: PrepareContext) -> Any:
        """The tuner's configuration, its bond resolved from the shapes of the targets."""
        from owlore.adapters import DotaConfig
        from owlore.adapters.targets import count_2d, find_targets
        from owlore.kernels.mpo import largest_bond

        given = {key: value for key, value in context.options.items() if key != "bond"}
        fresh = context.batches is not None  # where only shapes are known, nothing is decomposed
        config = DotaConfig(task_type="CAUSAL_LM", seed=context.seed, fresh=fresh, **{**given, **cls.fixed})
        sides = [target.shape for target in find_targets(model, config)]
        if config.density is not None:
            config.bond = largest_bond(sides, config.num_cores, int(config.density * count_2d(model)))
        elif context.options["bond"] is not None:
            config.bond = context.options["bond"]
        else:
            limit = sum(m * n for m, n in sides) // SHARE
            config.bond = min(config.bond, largest_bond(sides, config.num_cores, limit))
        return config


class QDoTA(DoTA):
    """DoTA on a base in four bits: the residual W - MPO(c0) is stored in NF4, the cores in fp32.

    Reference: Hu et al. 2024, "DoTA", arXiv 2412.20891 (QDoTA). NF4 with double quantisation, 4.127 bits a parameter.
    `alternations` refits the cores to what quantisation lost, as LoftQ does (ours). The base that is saved beside the
    adapter is the unquantised one, and `owlore merge` merges into that.
    """

    name = "qdota"
    summary = "DoTA beside a residual that is stored in NF4"
    memory = "4-bit weights of the targets + cores (twice, once frozen)"
    method_options = OPTIONS | {
        "alternations": MethodOption(0, integer(0), "Rounds of refitting the cores to what NF4 lost.")
    }
    fixed: ClassVar[dict[str, Any]] = {"residual": "explicit", "quantise": "nf4"}

    @classmethod
    def prepare(cls, model: nn.Module, context: PrepareContext) -> InjectedAdapter:
        from owlore.adapters.targets import find_targets
        from owlore.kernels.nf4 import planned_bytes

        injected = super().prepare(model, context)
        if context.batches is not None:
            return injected
        bases: list[Any] = [target.module.weight for target in find_targets(model, injected.config)]
        saved = sum(w.nbytes - planned_bytes(w.numel()) for w in bases)
        return replace(injected, saves_bytes=saved)

"""DoTA and QDoTA: tensor-train cores of the weights themselves, trained beside them."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from owlore.options import Own, choice, integer, number, targets
from owlore.strategies.adapter import AdapterStrategy
from owlore.strategies.base import Start

OPTIONS = {
    "num_cores": Own(3, integer(1), "Cores of each matrix; 1 is the dense matrix."),
    "bond": Own(16, integer(1), "Largest inner bond; bonds beyond a matrix's own are cut to it."),
    "density": Own(None, number(0, above=True, below=1), "Share of the 2-D parameters instead of `bond`."),
    "init": Own("mpo", choice("mpo", "random"), "The weight's own decomposition, or the paper's control."),
    "target_modules": Own("all-linear", targets(), "Linear maps that get cores, by name."),
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
    own = OPTIONS | {"residual": Own("implicit", choice("implicit", "explicit"), "Whether W keeps MPO(c0) inside.")}
    fixed: ClassVar[dict[str, Any]] = {}

    @classmethod
    def adapter_config(cls, model: nn.Module, start: Start) -> Any:
        from owlore.adapters import DotaConfig

        del model
        known = start.batches is not None  # else only shapes are: nothing is decomposed
        return DotaConfig(task_type="CAUSAL_LM", seed=start.seed, fresh=known, **{**start.own, **cls.fixed})


class QDoTA(DoTA):
    """DoTA on a base in four bits: the residual W - MPO(c0) rests in NF4, the cores in fp32.

    Reference: Hu et al. 2024, "DoTA", arXiv 2412.20891 (QDoTA). NF4 with double quantisation, 4.127 bits a parameter.
    `alternations` refits the cores to what quantisation lost, as LoftQ does (ours). The base that is saved beside the
    adapter is the unquantised one, and `owlore merge` merges into that.
    """

    name = "qdota"
    summary = "DoTA beside a residual that rests in NF4"
    memory = "4-bit weights of the targets + cores (twice, once frozen)"
    own = OPTIONS | {"alternations": Own(0, integer(0), "Rounds of refitting the cores to what NF4 lost.")}
    fixed: ClassVar[dict[str, Any]] = {"residual": "explicit", "quantise": "nf4"}

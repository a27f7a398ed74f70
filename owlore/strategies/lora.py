"""LoRA and DoRA, PEFT's own."""

from __future__ import annotations

from typing import Any

from torch import nn

from htsr.errors import UsageError
from owlore.injection import smallest_side
from owlore.options import MethodOption, choice, integer, number, targets
from owlore.strategies.adapter import AdapterStrategy
from owlore.strategies.base import PrepareContext

OPTIONS = {
    "r": MethodOption(16, integer(1), "Rank of the update, at most the smallest side of a target."),
    "alpha": MethodOption(None, number(0, above=True), "The update is scaled by alpha / r; twice r by default."),
    "dropout": MethodOption(0.0, number(0, below=1), "Share of the adapter's inputs that are dropped in training."),
    "target_modules": MethodOption("all-linear", targets(), "Linear maps that get an adapter, by name."),
    "init": MethodOption(
        "default", choice("default", "gaussian", "pissa"), "How A and B begin; pissa takes the leading part."
    ),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
# LLM-Adapters' comparison, whose rows the literature quotes: q, k, v, up and down.
PROTOCOL: dict[str, Any] = {
    "lr": 3e-4,
    "batch": 16,
    "seq_len": 256,
    "warmup": 100,
    "weight_decay": 0.0,
    "schedule": "linear",
    "set": {"r": 32, "alpha": 64, "target_modules": TARGETS},
}
USUAL = (OPTIONS["r"].default, PROTOCOL["set"]["r"])  # default ranks: lowered for a smaller model instead of refused


class LoRA(AdapterStrategy):
    """W + (alpha / r) B A with W frozen; B begins at zero, so the first output is the base model's.

    References: Hu et al. 2021, "LoRA", arXiv 2106.09685; Meng et al. 2024, "PiSSA", arXiv 2404.02948 (`init=pissa`: A
    and B begin as W's leading singular triples, which leave the frozen part). The code is PEFT's. A run with
    `init=pissa` saves a plain LoRA of rank 2r for the unchanged base, PEFT's own conversion. `--preset paper` has the
    settings of LLM-Adapters' comparison (rank 32, alpha 64, q, k, v, up, down), not those of the LoRA paper.
    """

    name = "lora"
    paper = "arXiv 2106.09685"
    summary = "low-rank updates B A beside frozen weights"
    share = "r (m + n) values a matrix of m x n"
    memory = "weights + adapter"
    method_options = OPTIONS
    preset = PROTOCOL
    dora = False

    @classmethod
    def adapter_config(cls, model: nn.Module, context: PrepareContext) -> Any:
        from peft import LoraConfig

        options = context.options
        side = smallest_side(model, options["target_modules"])
        if options["r"] > max(side, *USUAL):
            raise UsageError(f"--set r got {options['r']}, expected at most {side}, the smallest side of a target")
        rank = min(options["r"], side)
        init: Any = options["init"]
        if init == "default" or (init == "pissa" and context.batches is None):  # only shapes: nothing to decompose
            init = True
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=options["alpha"] or 2 * rank,
            lora_dropout=options["dropout"],
            target_modules=options["target_modules"],
            init_lora_weights=init,
            use_dora=cls.dora,
        )


class DoRA(LoRA):
    """LoRA on the direction of each column of W, with the columns' magnitudes trained beside it.

    Reference: Liu et al. 2024, "DoRA", arXiv 2402.09353, as PEFT has it (`use_dora`). `--preset paper`: rank 16 at
    2e-4, the row of the DoRA repository for LLaMA-7B.
    """

    name = "dora"
    paper = "arXiv 2402.09353"
    summary = "LoRA on directions, magnitudes trained beside it"
    share = "r (m + n) + m values a matrix of m x n"
    method_options = OPTIONS | {"init": MethodOption("default", choice("default", "gaussian"), "How A begins.")}
    preset = PROTOCOL | {"lr": 2e-4, "set": {"r": 16, "target_modules": TARGETS}}
    dora = True

"""SMT: a few blocks of chosen matrices, trained densely."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from owlore.choices import SMT_ALLOTMENTS, SMT_CRITERIA, SMT_SELECTIONS
from owlore.injection import InjectedAdapter, inject_adapter
from owlore.optim import UpdateSpec
from owlore.options import MethodOption, choice, integer, number, targets
from owlore.strategies.adapter import AdapterStrategy
from owlore.strategies.base import PrepareContext


class SMT(AdapterStrategy):
    """Deltas on l x l blocks of the targets; the blocks with the largest gradients, within a budget.

    The blocks are scored in a frozen warm-up before step 1 (`warmup_batches` micro-batches, the first ones of the run):
    no optimizer, one matrix's gradient at a time. It takes time and no steps; every checkpoint stores the map.
    l is halved until the budget holds a block for each target matrix.

    Reference: He et al. 2025, "Sparse Matrix Tuning", arXiv 2405.15525. Deviations: the published warm-up is 100 steps
    of full fine-tuning whose changes are kept; attention and feed-forward blocks compete in one list; the published
    code's |mean g| is the criterion `abs_of_mean`, the paper's wording `mean_of_abs` is the default. `--preset paper`:
    the settings of the published scripts, with 0.84 % of the 2-D parameters.
    """

    name = "smt"
    paper = "arXiv 2405.15525"
    summary = "l x l blocks of weights with the largest gradients, trained densely"
    share = "`density` of the 2-D parameters"
    memory = "weights + fp32 deltas and AdamW state of the chosen blocks"
    method_options = {
        "density": MethodOption(
            0.0084, number(0, above=True, below=1 + 1e-9), "Share of all 2-D parameters that is trained."
        ),
        "block_size": MethodOption(256, integer(1), "Side l of a block, before halving."),
        "selection": MethodOption(
            "gradient", choice(*SMT_SELECTIONS), "By gradients, by mean |w|, by the seed, or on the diagonal."
        ),
        "criterion": MethodOption("mean_of_abs", choice(*SMT_CRITERIA), "Score of a block's gradients."),
        "allotment": MethodOption(
            None, choice(*SMT_ALLOTMENTS), "One list for all, or equal numbers; the tuner's own."
        ),
        "warmup_batches": MethodOption(16, integer(1), "Micro-batches that score the blocks before step 1."),
        "target_modules": MethodOption(
            None, targets(), "Maps that may get blocks; q, k and v, or PEFT's choice for the model."
        ),
        "beta2": MethodOption(0.999, number(0, below=1), "AdamW's beta2."),
    }
    preset = {
        "lr": 9.65e-6,
        "batch": 64,
        "seq_len": 2048,
        "warmup": 100,
        "schedule": "linear",
        "weight_decay": 0.0,
        "clip": 1.0,
        "set": {"density": 0.0084, "block_size": 256, "warmup_batches": 100, "beta2": 0.95,
                "target_modules": ["q_proj", "k_proj", "v_proj"]},
    }  # fmt: skip

    @classmethod
    def prepare(cls, model: nn.Module, context: PrepareContext) -> InjectedAdapter:
        from owlore.adapters import select_blocks

        config = cls.adapter_config(model, context)
        if context.saved is not None:
            config.block_map = context.saved["block_map"]
        elif config.selection == "gradient" and context.batches is not None:
            batches = context.batches(context.options["warmup_batches"])
            config.block_map = select_blocks(model, batches, config, loss=context.loss)
        elif config.selection == "gradient":
            config.selection = "diagonal"  # only shapes are known: as many blocks of the same size
        injected = inject_adapter(model, config, seed=context.seed)
        return replace(injected, notes={"block_map": config.block_map})

    @classmethod
    def adapter_config(cls, model: nn.Module, context: PrepareContext) -> Any:
        from owlore.adapters import SmtConfig

        names = ("density", "block_size", "selection", "criterion", "allotment")
        target_modules = context.options["target_modules"]
        if target_modules is None and any(name.endswith(".q_proj") for name, _ in model.named_modules()):
            target_modules = ["q_proj", "k_proj", "v_proj"]
        return SmtConfig(
            task_type="CAUSAL_LM",
            seed=context.seed,
            target_modules=target_modules,
            **{name: context.options[name] for name in names},
        )

    def spec(self, ndim: int, *, projectable: bool) -> UpdateSpec:
        spec = super().spec(2, projectable=projectable)  # the deltas are parts of matrices, stored flat
        return replace(spec, adam=replace(spec.adam, beta2=self.config.options["beta2"]))

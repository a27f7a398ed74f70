"""The same steps in other people's code: transformers' Trainer (plain, GaLore, a LISA callback, LoRA) and BAdam."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from measure import Clock, even_pairs, every_third, token_batches

ARMS = {
    "Trainer": "transformers' Trainer, adamw_torch",
    "Trainer galore": "its galore_adamw, rank 128, all attention and MLP matrices",
    "Trainer LISA": "a LISA callback on it: two blocks, embeddings and head on, optimizer built once",
    "Trainer LoRA": "PEFT LoRA r16 on all linear maps",
    "BAdam": "package badam, one block, every third block once",
}


def imports() -> None:
    """Modules whose code is not to be charged to the first step."""
    import accelerate  # noqa: F401
    import badam  # noqa: F401
    import galore_torch  # noqa: F401
    import peft  # noqa: F401
    from transformers import Trainer, TrainingArguments  # noqa: F401


def run(args: argparse.Namespace, arm: str, model: Any, steps: int) -> dict[str, Any]:
    if arm == "BAdam":
        return badam(args, model)
    blocks = model.config.num_hidden_layers
    more: dict[str, Any] = {}
    callbacks = []
    if arm == "Trainer galore":
        more = {
            "optim": "galore_adamw", "optim_target_modules": ["attn", "mlp"],
            "optim_args": "rank=128, update_proj_gap=200, scale=0.25",
        }  # fmt: skip
    if arm == "Trainer LISA":
        callbacks, steps = [lisa_callback(model, even_pairs(blocks))], blocks // 2
    if arm == "Trainer LoRA":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return trained(args, model, steps, callbacks, more)


def trained(
    args: argparse.Namespace, model: Any, steps: int, callbacks: list[Any], more: dict[str, Any]
) -> dict[str, Any]:
    """Steps of transformers' Trainer on the shared batches in their order; the first one is warm-up."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *unused: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    clock = Clock()

    class Timed(TrainerCallback):
        def on_step_begin(self, *unused: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *unused: Any, **kwargs: Any) -> None:
            clock.stop()

    rows = [{"input_ids": row, "labels": row} for row in token_batches(args).flatten(0, 1)]
    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            output_dir=directory, per_device_train_batch_size=args.batch, max_steps=steps + 1, learning_rate=args.lr,
            lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=1, report_to="none", save_strategy="no",
            use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **more,
        )  # fmt: skip
        trainer = InOrder(model=model, args=settings, train_dataset=rows, callbacks=[*callbacks, Timed()])
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return clock.after_warm_up() | {"losses": losses[1:]}


def lisa_callback(model: Any, draws: list[tuple[int, ...]]) -> Any:
    """LISA as its paper describes it (arXiv 2403.17919, algorithm 1), the way published callbacks do it: before each
    period everything is frozen but embeddings, head, norm and the drawn blocks. The optimizer knows all parameters
    from the start and keeps the moments of those that leave."""
    from transformers import TrainerCallback

    layers = model.model.layers

    class Lisa(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            drawn = draws[max(0, state.global_step - 1) % len(draws)]
            for index, layer in enumerate(layers):
                layer.requires_grad_(index in drawn)

    return Lisa()


def badam(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """BAdam's optimizer around torch's AdamW in a plain loop; a new block every step, which costs it what a switch
    costs us."""
    import torch
    from badam import BlockOptimizer

    drawn = [[f"layers.{index}."] for index in every_third(model.config.num_hidden_layers)]
    inner = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    optimizer = BlockOptimizer(
        inner, list(model.named_parameters()), block_prefix_list=drawn, switch_block_every=1, switch_mode="ascending",
        verbose=0,
    )  # fmt: skip
    clock, losses = Clock(), []
    for ids in token_batches(args)[: 1 + len(drawn)]:
        clock.start()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        clock.stop()
        losses.append(float(loss.detach()))
    return clock.after_warm_up() | {"losses": losses[1:]}

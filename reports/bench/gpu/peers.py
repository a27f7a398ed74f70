"""The same model and batch in transformers' Trainer: PEFT LoRA, a LISA callback, layer-wise GaLore, full fine-tuning.

The LISA callback is the published idea on the Trainer: every K steps gamma random blocks are made trainable with
embeddings, norm and head, everything else frozen, AdamW over all of them made at the first step.
"""

from __future__ import annotations

import random
import tempfile
from typing import Any

import torch
from shapes import filled


class Tokens(torch.utils.data.Dataset):
    """Seeded rows, every token a target."""

    def __init__(self, rows: int, tokens: int, vocabulary: int) -> None:
        stream = torch.Generator().manual_seed(0)
        self.ids = torch.randint(4, vocabulary, (rows, tokens), generator=stream)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


def lisa_callback(model: Any, gamma: int, every: int) -> Any:
    from transformers import TrainerCallback

    class Lisa(TrainerCallback):
        stream = random.Random(0)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % every:
                return
            chosen = self.stream.sample(range(len(model.model.layers)), gamma)
            for index, block in enumerate(model.model.layers):
                block.requires_grad_(index in chosen)

    return Lisa()


def run_peer(row: Any, device: torch.device, steps: int, clock: Any) -> None:
    """`steps` optimizer steps of `row.peer`; `clock(callback)` wraps what is timed."""
    from transformers import Trainer, TrainingArguments

    model = filled(row.shape, device).requires_grad_(True)
    callbacks, optim, targets = [clock], "adamw_torch", None
    if row.peer == "lora-16":
        from peft import LoraConfig, get_peft_model

        model.requires_grad_(False)
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    elif row.peer == "lisa":
        callbacks.append(lisa_callback(model, min(row.gamma, len(model.model.layers)), 2))
    elif row.peer == "galore":
        optim, targets = "galore_adamw_layerwise", ["self_attn", "mlp"]
    with tempfile.TemporaryDirectory() as directory:
        layerwise = row.peer == "galore"  # it allows no accumulation
        arguments = TrainingArguments(
            output_dir=directory, max_steps=steps, report_to=[], save_strategy="no", logging_strategy="no",
            per_device_train_batch_size=row.batch * (row.accum if layerwise else 1),
            gradient_accumulation_steps=1 if layerwise else row.accum,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
            learning_rate=1e-4, optim=optim, optim_target_modules=targets,
            optim_args=f"rank={row.rank}, update_proj_gap=50, scale=1.0" if targets else None,
            use_cpu=device.type == "cpu", bf16=False, disable_tqdm=True, dataloader_pin_memory=device.type == "cuda",
        )  # fmt: skip
        data = Tokens(row.batch * row.accum * steps, row.tokens, model.config.vocab_size)
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()

"""`owlore.train`, and the same from a configuration."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from htsr.errors import UsageError
from owlore.config import TrainConfig
from owlore.run.inputs import open_inputs
from owlore.run.lifecycle import run_inputs
from owlore.run.result import Run
from owlore.training.distributed import join


def train(model: Any, data: Any, *, tokenizer: Any = None, table: Any = None, **settings: Any) -> Run:
    """Fine-tune a causal language model; the Python form of `owlore train`.

    A module is trained in place; afterwards, and after an error, it is in evaluation mode and none of its parameters
    requires a gradient. An adapter stays in it (`run.model` is PEFT's model around it).

    Args:
        model: Hugging Face id, directory, GGUF file, `demo`, or an `nn.Module` (with `tokenizer`).
        data: path, name of a data set, list of dicts, DataFrame or Dataset.
        tokenizer: the tokenizer of a module; None for the model's own.
        table: `auto`, `uniform`, a file or a `htsr.LayerTable`; None for the method's default.
        **settings: any other option of the command line by its Python name (`steps=60`, `method="owlore"`, `lr=3e-4`).
            Nothing is printed unless `quiet=False` is among them.

    Returns:
        The finished run.

    Raises:
        HtsrError: a subclass of `htsr.errors`, each of which is a builtin error too (ValueError, FileNotFoundError).
    """
    named: dict[str, Any] = {"quiet": True, **settings}
    named |= {"model": model if isinstance(model, str | Path) else "(model in memory)"}
    named |= {"data": data if isinstance(data, str | Path) else "(data in memory)"}
    if isinstance(table, str | Path):
        named["table"] = str(table)
    elif table is not None:
        named["table"] = "(table in memory)"
    config = TrainConfig.build(named)
    return train_from_config(config, model=model, data=data, tokenizer=tokenizer, table=table)


@torch.inference_mode(False)
@torch.enable_grad()
def train_from_config(
    config: TrainConfig, *, model: Any = None, data: Any = None, tokenizer: Any = None, table: Any = None
) -> Run:
    """Run what a configuration describes.

    Nothing is written before the model, the data and the table are known to be usable. Under torchrun every process
    works on the run and returns it; the first one writes files and prints.

    Args:
        config: the settings.
        model: a module that replaces `config.model`; None for what `config` names.
        data: rows that replace `config.data`; None for what `config` names.
        tokenizer: the tokenizer; None for the model's own.
        table: a layer table that replaces `config.table`; None for what `config` names.

    Returns:
        The finished run.

    Raises:
        HtsrError: the subclass whose exit code fits.
    """
    started = time.perf_counter()
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        raise UsageError("got torch.autocast around the run, expected none: dtype='bfloat16' chooses the precision")
    ranks = join(config.device)
    inputs = open_inputs(config, ranks=ranks, model=model, data=data, tokenizer=tokenizer, table=table)
    return run_inputs(inputs, started)

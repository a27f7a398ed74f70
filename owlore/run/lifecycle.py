"""A built run from its first step to the files it leaves; a run that fails leaves the model without patches."""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

import torch

from htsr.console import progress
from htsr.errors import OutOfMemory
from owlore.activations.malloc_trim import trimmed_heap
from owlore.activations.saved_tensors import saved_tensors_in_arena
from owlore.blocks import freeze
from owlore.io.export import export, export_adapter
from owlore.io.export_files import export_files
from owlore.io.trackers import open_trackers
from owlore.patches import PatchStack
from owlore.run.build import build_trainer, reassemble_module
from owlore.run.inputs import RunInputs
from owlore.run.model_card import model_card
from owlore.run.progress import reporter
from owlore.run.result import Run, is_out_of_memory, memory_advice, run_record, save_plots
from owlore.settings import placement_of, recomputes
from owlore.training.trainer import Trainer


def run_inputs(inputs: RunInputs, started: float) -> Run:
    """Build the trainer, train, export and report; a run that fails before its first step leaves no directory.

    Args:
        inputs: what the run starts from.
        started: `time.perf_counter()` when the run was asked for.

    Raises:
        OutOfMemory: with what was held and what other settings would save.
        HtsrError: as the trainer raises; the model is then frozen, in evaluation mode and without patches.
    """
    patches, loaded = PatchStack(), inputs.loaded
    trainer = build_trainer(inputs, patches)
    try:
        _train(inputs, trainer)
    except BaseException as error:
        reassemble_module(inputs, trainer.backend, patches)
        freeze(loaded.model.eval())  # as after a run
        if inputs.ranks.leads and trainer.step == 0 and not inputs.directory.existed:
            shutil.rmtree(inputs.directory.path, ignore_errors=True)
        if is_out_of_memory(error):
            raise OutOfMemory(memory_advice(trainer, inputs.config, inputs.table)) from error
        raise
    patches.close()
    loaded.model.eval()
    run = Run(
        directory=inputs.directory.path,
        give=lambda: _model_of(inputs, trainer),
        tokenizer=loaded.tokenizer,
        table=inputs.table,
        record=run_record(inputs, trainer, time.perf_counter() - started),
        rows=tuple(trainer.metrics.rows),
        leads=inputs.ranks.leads,
    )
    if inputs.ranks.leads:
        _write_results(inputs, trainer, run)
    inputs.ranks.wait()
    if not loaded.origins:  # the model was in memory as a whole before, so it is put together again at once
        _ = run.model
    return run


def _train(inputs: RunInputs, trainer: Trainer) -> None:
    config, directory, leads = inputs.config, inputs.directory, inputs.ranks.leads
    first_step, steps = trainer.step, trainer.config.steps
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    if leads:
        directory.path.mkdir(parents=True, exist_ok=True)
    trainer.metrics.open(after=None if directory.saved is None else directory.saved.step)
    if leads:
        (directory.path / "config.yaml").write_text(config.to_yaml())
    if leads and inputs.table is not None:
        inputs.table.save(directory.path / "table.json")
    with (
        open_trackers(config.log_to if leads else (), directory.path, config.to_dict(), step=first_step) as trackers,
        progress(steps, "training", "step", quiet=config.quiet, initial=first_step) as bar,
        trimmed_heap(trainer.parts.modules, trainer.device),
        saved_tensors_in_arena(trainer.parts.modules, enabled=_keeps_on_the_heap(inputs, trainer)),
    ):
        trainer.run(reporter(bar, inputs.notify, steps, trackers))


def _keeps_on_the_heap(inputs: RunInputs, trainer: Trainer) -> bool:
    """Whether activations that autograd saves stay in the C heap until backward uses them."""
    recomputed = placement_of(inputs.config).streams or recomputes(inputs.config, inputs.parts)
    return trainer.device.type == "cpu" and not recomputed and not inputs.config.compile


def _model_of(inputs: RunInputs, trainer: Trainer) -> Any:
    """The trained model in one piece."""
    on_device = inputs.config.residency == "device" and trainer.backend.exact
    trainer.backend.reassemble(trainer.device if on_device else torch.device("cpu"))
    return inputs.loaded.model if inputs.injected is None else inputs.injected.wrapper


def _write_results(inputs: RunInputs, trainer: Trainer, run: Run) -> None:
    """Write the model or adapter, run.json, the model card and the plots."""
    directory, loaded, values = run.directory / "model", inputs.loaded, trainer.backend.values
    if inputs.injected is not None:
        export_adapter(loaded, inputs.injected, directory)
    elif loaded.origins:
        export_files(
            loaded, directory, trained=trainer.trained, seed=inputs.config.seed, value=lambda name: values([name])[name]
        )
    else:
        export(loaded, directory, trained=trainer.trained, seed=inputs.config.seed, values=values)
    (run.directory / "run.json").write_text(json.dumps(run.record, indent=1, allow_nan=False) + "\n")
    card = model_card(run.record, paper=inputs.strategy_class.paper, adapter=inputs.strategy_class.adapts)
    (run.directory / "README.md").write_text(card)
    save_plots(run)

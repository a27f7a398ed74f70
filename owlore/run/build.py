"""From the inputs of a run to its trainer: the pieces are made here and put onto the model."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import torch

from htsr.errors import BadInput, UsageError
from owlore.activations.checkpointing import ActivationCheckpointing
from owlore.activations.compiled import compile_blocks
from owlore.io.metrics import MetricsLog
from owlore.optim import RotatingOptimizer
from owlore.patches import PatchStack
from owlore.run.directory import check_same_run
from owlore.run.inputs import RunInputs, arrange
from owlore.settings import master_policy, placement_of, recomputes, strategy_config
from owlore.strategies import Strategy
from owlore.training.backend import Backend
from owlore.training.loss import CausalLoss
from owlore.training.resident import ResidentBackend
from owlore.training.rotation import Rotation
from owlore.training.streamed import StreamedBackend, open_streamed_backend
from owlore.training.trainer import LoopConfig, RunStats, Trainer

FP16_SCALE = 1024.0  # keeps small fp16 gradients above underflow; divided out before they are accumulated


def build_trainer(inputs: RunInputs, patches: PatchStack) -> Trainer:
    """Make the trainer of a run, restored where the run goes on; the run directory is not touched yet.

    Args:
        inputs: what the run starts from.
        patches: everything that is put onto the model is registered here; it is closed when this fails.

    Raises:
        HtsrError: settings, model and data do not go together. The model has no patches then.
    """
    config, parts, loaded, ranks = inputs.config, inputs.parts, inputs.loaded, inputs.ranks
    strategy = inputs.strategy_class(parts, strategy_config(config, inputs.table, inputs.injected))
    identity = {
        "weights_sha256": loaded.weights_sha256,
        "data_sha256": inputs.prepared.provenance["train"]["sha256"],
        "inclusion": None if inputs.table is None else strategy.config.inclusion.tolist(),
        "processes": ranks.size,
        "config": config.to_dict(),
    }
    ranks.agree("weights, data, table or settings", json.dumps(identity))
    if inputs.directory.saved is not None:
        check_same_run(identity, inputs.directory.saved.state["identity"])
    # The optimizer looks for plain linear maps, so it is made before any forward is replaced.
    optimizer = _optimizer(inputs, patches)
    # What is put onto the model last runs first, so the order of these lines is that of the forwards from the inside.
    streams = placement_of(config).streams
    streamed = None
    try:
        if config.compile:
            compile_blocks(parts.modules, device=inputs.device, patches=patches, always=streams)
        streamed = _open_streamed(inputs, patches) if streams else None
        return _trainer(inputs, identity, strategy, optimizer, streamed, patches)
    except BaseException:
        reassemble_module(inputs, streamed, patches)
        raise


def _trainer(
    inputs: RunInputs,
    identity: dict[str, Any],
    strategy: Strategy,
    optimizer: RotatingOptimizer,
    streamed: StreamedBackend | None,
    patches: PatchStack,
) -> Trainer:
    config, parts, ranks = inputs.config, inputs.parts, inputs.ranks
    loss = CausalLoss(inputs.loaded.model)
    backend: Backend
    if streamed is None:
        recompute = ActivationCheckpointing(parts.modules, enabled=recomputes(config, parts), patches=patches)
        backend = ResidentBackend(parts, optimizer, loss, inputs.device, recompute)
    else:
        streamed.connect(loss, optimizer, compiled=config.compile)
        backend = streamed
    if config.packing and not loss.isolates_packed_rows():
        raise BadInput(
            "--packing: this model lets packed rows see each other, or does not number them anew (tried on two "
            "rows); use --group-by-length"
        )
    arrangement = arrange(config, inputs.prepared, ranks.size)
    steps = config.steps if arrangement.steps is None else arrangement.steps
    same = {f.name: getattr(config, f.name) for f in fields(LoopConfig) if f.name != "steps"}
    every = config.every if "every" in inputs.strategy_class.accepted_options else None
    trainer = Trainer(
        parts=parts,
        rotation=Rotation(
            strategy=strategy, optimizer=optimizer, every=every, set_active=backend.set_active, agree=ranks.agree
        ),
        backend=backend,
        loss=loss,
        config=LoopConfig(steps=int(steps or 0), **same),
        data=inputs.prepared.train,
        arrangement=arrangement,
        eval_data=inputs.prepared.heldout,
        metrics=MetricsLog(
            inputs.directory.path / "metrics.jsonl",
            more=() if backend.frozen is None else ("weights",),
            writes=ranks.leads,
        ),
        checkpoints=inputs.directory.checkpoints,
        device=inputs.device,
        identity=identity,
        stats=RunStats(draws=[0] * parts.num_blocks),
        injected=inputs.injected,
        ranks=ranks,
    )
    if inputs.directory.saved is not None:
        trainer.restore(inputs.directory.saved)
    return trainer


def reassemble_module(inputs: RunInputs, backend: Backend | None, patches: PatchStack) -> None:
    """After a failure, close the patches and put a streamed module that the caller gave into one piece.

    A streamed model that was read from files stays in parts, because the caller has no reference to it.

    Args:
        inputs: what the run started from.
        backend: the backend, if it was made.
        patches: everything that was put onto the model.
    """
    patches.close()
    if backend is not None and not inputs.loaded.origins:
        backend.reassemble(torch.device("cpu"))


def _open_streamed(inputs: RunInputs, patches: PatchStack) -> StreamedBackend:
    if inputs.ranks.size > 1:
        raise UsageError(
            f"{inputs.ranks.size} processes with --residency host, --frozen or --offload-activations, expected one: "
            "the frozen blocks stream in one process only"
        )
    return open_streamed_backend(
        placement_of(inputs.config),
        inputs.parts,
        inputs.loaded,
        always_on=inputs.config.always_on,
        device=inputs.device,
        directory=inputs.directory.path,
        notify=inputs.notify,
        patches=patches,
    )


def _optimizer(inputs: RunInputs, patches: PatchStack) -> RotatingOptimizer:
    parts, config, injected = inputs.parts, inputs.config, inputs.injected
    candidates = parts.parameters(range(parts.num_blocks), parts.groups)
    if injected is not None:
        candidates = {name: p for name, p in candidates.items() if name in injected.trained}
    return RotatingOptimizer(
        candidates,
        seed=config.seed,
        policy=master_policy(config),
        on_switch=config.on_switch,
        grad_scale=FP16_SCALE if inputs.loaded.model.dtype == torch.float16 else 1.0,
        add_up=inputs.ranks.sum_into if inputs.ranks.size > 1 else None,
        layers=() if config.compile else parts.modules,
        patches=patches,
    )

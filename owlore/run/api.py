"""A whole run: assemble the pieces, train, export, and write down what happened."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from htsr.console import notice, progress
from htsr.errors import BadInput, OutOfMemory, UsageError
from owlore.activations.checkpointing import Recompute
from owlore.activations.compiled import Compiled
from owlore.activations.malloc_trim import trimmed_heap
from owlore.activations.saved_tensors import shelved
from owlore.attach import Attached
from owlore.blocks import Units, find_units, freeze
from owlore.config import TrainConfig
from owlore.data.arrange import Arrangement, Grouped
from owlore.data.files import locate_data
from owlore.data.packing import Packed
from owlore.data.prepare import Prepared, prepare
from owlore.data.tokenise import Encoded
from owlore.io.export import export, export_adapter
from owlore.io.export_files import export_files
from owlore.io.metrics import MetricsLog, spans
from owlore.io.trackers import Tracker, check_trackers, open_trackers
from owlore.kernels.cross_entropy import IGNORED
from owlore.layer_table import cache_directory, find_table, floor_of, run_inclusion, scanned_table
from owlore.models.loading import Loaded, load, pick_device
from owlore.optim import RotatingOptimizer
from owlore.run.model_card import model_card
from owlore.run.result import Run, is_out_of_memory, memory_advice, run_record, save_plots
from owlore.settings import (
    Place,
    check_same_run,
    find_place,
    hyper_of,
    recomputes,
    resolve,
    weights_of,
)
from owlore.strategies import Start, Strategy
from owlore.training.distributed import ALONE, Ranks, join
from owlore.training.loss import CausalLoss
from owlore.training.streamed import Streaming, open_streaming, streams
from owlore.training.trainer import Pace, Tally, Trainer, collated

if TYPE_CHECKING:
    from htsr import LayerTable

FP16_SCALE = 1024.0  # keeps small fp16 gradients above underflow; divided out before they are gathered


def train(model: Any, data: Any, *, tokenizer: Any = None, table: Any = None, **settings: Any) -> Run:
    """Fine-tune a causal language model; the Python form of `owlore train`.

    model: Hugging Face id, directory, GGUF file, `demo`, or an `nn.Module` (with `tokenizer`). data: path, name, list
    of dicts, DataFrame or Dataset. table: `auto`, `uniform`, a file or a `htsr.LayerTable`. settings: any other option
    of the command line by its Python name (`steps=60`, `method="owlore"`, `lr=3e-4` ...).

    Nothing is said aloud (`quiet=False` shows the data, the steps and what is noteworthy as the command does).

    A module is trained as it lies; afterwards, and after an error, it is in evaluation mode and none of its parameters
    requires a gradient. An adapter stays in it (`run.model` is PEFT's model around it).

    Raises: the errors of `htsr.errors`, whose classes are also ValueError, FileNotFoundError and so on.
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
    """Run what `config` describes; the objects, where given, stand for what its fields of the same name call them.

    Nothing is written before the model, the data and the table are known to be usable. Under torchrun every process
    works on the run and returns it; the first one writes and speaks.
    """
    started = time.perf_counter()
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        raise UsageError("got torch.autocast around the run, expected none: dtype='bfloat16' chooses the precision")
    ranks = join(config.device)
    model = config.model if model is None else model
    if not ranks.leads:
        config = replace(config, quiet=True)
    say = _speaker(config)
    config, strategy_class = resolve(config)
    check_trackers(config.log_to)
    for named in (config.data if data is None else data, config.eval_data):
        if isinstance(named, str | Path):
            locate_data(named)  # a wrong path is said now, not after a large model has been loaded
    place = find_place(config, slug(str(model) if isinstance(model, str | Path) else type(model).__name__))
    device = pick_device(ranks.pick(config.device))
    home = torch.device("cpu") if streams(config) else device
    leave = say if streams(config) else None
    loaded = load(model, dtype=_load_dtype(config), attn=config.attn, device=home, tokenizer=tokenizer, leave=leave)
    freeze(loaded.model)
    with ranks.lead_first():
        prepared = prepare(
            config.data if data is None else data,
            loaded.tokenizer,
            seq_len=_seq_len(config, loaded, say),
            eval_data=config.eval_data,
            seed=config.seed,
            cache=cache_directory() / "tokens",
        )
        for line in prepared.report.shown():
            say(line)
    prepared = _within_vocabulary(prepared, loaded.model.get_input_embeddings().weight.shape[0])
    attached = attach(config, strategy_class, loaded, prepared, place, device)
    units = find_units(loaded.model)
    with ranks.lead_first():
        found = find_table(
            table if table is not None else (config.table if strategy_class.table is not None else None),
            num_blocks=units.num_blocks,
            weights_sha256=loaded.weights_sha256,
            say=say,
            scan=lambda: scanned_table(
                model, loaded.tokenizer, weights_sha256=loaded.weights_sha256, say=say, quiet=config.quiet
            ),
        )
    if found is not None and config.floor is None and (floor := floor_of(found)):
        say(f"note: the table was made with floor {floor:g}, which this run keeps; --floor 0 leaves it out")
    if (config.active or 0) > units.num_blocks:
        say(f"note: --active got {config.active}, the model has {units.num_blocks} blocks: all are always trained")
    trainer = assemble(config, strategy_class, units, attached, loaded, prepared, found, place, device, say, ranks)
    return _train(config, strategy_class, trainer, loaded, prepared, found, place, started, say)


def attach(
    config: TrainConfig,
    strategy_class: type[Strategy],
    loaded: Loaded,
    prepared: Prepared,
    place: Place,
    device: torch.device,
) -> Attached | None:
    """Let the method put its adapter into the loaded model, if it has one; nothing is trainable afterwards."""
    arrangement = arrange(config, prepared)

    def batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
        every = (part for step in itertools.count(1) for part in arrangement.step(step))
        for part in itertools.islice(every, count):
            yield collated(prepared.train, part).on(device)

    saved = None if place.saved is None else place.saved.state.get("notes")
    start = Start(own=config.set or {}, seed=config.seed, batches=batches, loss=_mean_loss(loaded.model), saved=saved)
    attached = strategy_class.prepare(loaded.model, start)
    freeze(loaded.model)
    return attached


def _mean_loss(model: Any) -> Callable[[torch.nn.Module, Any], torch.Tensor]:
    """Mean loss a trained token of the model as it is now; other models are not taken."""
    causal: list[CausalLoss] = []

    def loss(asked: torch.nn.Module, batch: Any) -> torch.Tensor:
        assert asked is model
        causal[:] = causal or [CausalLoss(model)]  # made when it is first needed
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        return causal[0](**batch) / max(1, tokens)

    return loss


def assemble(
    config: TrainConfig,
    strategy_class: type[Strategy],
    units: Units,
    attached: Attached | None,
    loaded: Loaded,
    prepared: Prepared,
    table: LayerTable | None,
    place: Place,
    device: torch.device,
    say: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> Trainer:
    """The trainer of a run, restored where the run goes on; its directory is not touched yet.

    A run that is refused here gives the model back as it came.
    """
    inclusion = None if table is None else run_inclusion(table, active=config.active, floor=config.floor)
    identity = {
        "weights_sha256": loaded.weights_sha256,
        "data_sha256": prepared.provenance["train"]["sha256"],
        "inclusion": None if inclusion is None else inclusion.tolist(),
        "processes": ranks.size,
        "config": config.to_dict(),
    }
    ranks.agree("weights, data, table or settings", json.dumps(identity))
    if place.saved is not None:
        check_same_run(identity, place.saved.state["identity"])
    strategy = strategy_class(units, hyper_of(config, inclusion, attached))
    candidates = units.parameters(range(units.num_blocks), units.groups)
    if attached is not None:
        candidates = {name: p for name, p in candidates.items() if name in attached.trained}
    optimizer = RotatingOptimizer(
        candidates,
        seed=config.seed,
        weights=weights_of(config),
        on_switch=config.on_switch,
        grad_scale=FP16_SCALE if loaded.model.dtype == torch.float16 else 1.0,
        add_up=ranks.sum_into if ranks.size > 1 else None,
        layers=() if config.compile else units.modules,
    )
    arrangement = arrange(config, prepared, ranks.size)
    with ExitStack() as undo:
        put_on = undo.enter_context(ExitStack())
        # Before the blocks are walked one by one: what is walked is then the compiled block.
        compiled = Compiled(units.modules, enabled=config.compile, device=device, always=streams(config))
        put_on.callback(compiled.remove)
        streaming = None
        if streams(config):
            if ranks.size > 1:
                raise UsageError(
                    f"{ranks.size} processes with --residency host, --frozen or --offload-activations, expected one: "
                    "the frozen blocks stream in one process only"
                )
            streaming = open_streaming(config, units, loaded, device=device, directory=place.directory, say=say)
            undo.callback(_reunite, streaming, loaded)
        undo.callback(optimizer.remove)  # it lies on top of what reads a quantised block
        loss = CausalLoss(loaded.model)
        if streaming is not None:
            streaming.connect(loss, optimizer, compiled=config.compile)
        if config.packing and not loss.keeps_rows_apart():
            raise BadInput(
                "--packing: this model lets packed rows see each other, or does not number them anew (tried on two "
                "rows); use --group-by-length"
            )
        recompute = Recompute(units.modules, enabled=streaming is None and recomputes(config, units))
        put_on.callback(recompute.remove)
        trainer = Trainer(
            units=units,
            strategy=strategy,
            optimizer=optimizer,
            loss=loss,
            put_on=put_on,
            recompute=recompute,
            streaming=streaming,
            pace=_pace(config, strategy_class, arrangement),
            data=prepared.train,
            arrangement=arrangement,
            eval_data=prepared.heldout,
            metrics=MetricsLog(
                place.directory / "metrics.jsonl", more=() if streaming is None else ("weights",), writes=ranks.leads
            ),
            checkpoints=place.checkpoints,
            device=device,
            identity=identity,
            tally=Tally(draws=[0] * units.num_blocks),
            attached=attached,
            ranks=ranks,
        )
        if place.saved is not None:
            trainer.restore(place.saved)
        undo.pop_all()
    return trainer


def _reunite(streaming: Streaming | None, loaded: Loaded) -> None:
    """After a failure: a module of the caller's is in one piece again. What was read from files is only dropped."""
    if streaming is not None and not loaded.origins:
        streaming.remove(torch.device("cpu"))


def _train(
    config: TrainConfig,
    strategy_class: type[Strategy],
    trainer: Trainer,
    loaded: Loaded,
    prepared: Prepared,
    table: LayerTable | None,
    place: Place,
    started: float,
    say: Callable[[str], None],
) -> Run:
    """Train, export and report; a run that fails before its first step leaves no directory behind."""
    first_step, leads = trainer.step, trainer.ranks.leads
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    try:
        if leads:
            place.directory.mkdir(parents=True, exist_ok=True)
        trainer.metrics.open(after=None if place.saved is None else place.saved.step)
        if leads:
            (place.directory / "config.yaml").write_text(config.to_yaml())
        if leads and table is not None:
            table.save(place.directory / "table.json")
        with (
            open_trackers(
                config.log_to if leads else (), place.directory, config.to_dict(), step=first_step
            ) as trackers,
            progress(trainer.pace.steps, "training", "step", quiet=config.quiet, initial=first_step) as bar,
            trimmed_heap(trainer.units.modules, trainer.device),
            shelved(trainer.units.modules, enabled=_keeps_on_the_heap(trainer, config)),
        ):
            trainer.run(_reporter(bar, say, trainer.pace.steps, trackers))
    except BaseException as error:
        trainer.optimizer.remove()
        _reunite(trainer.streaming, loaded)
        trainer.put_on.close()
        freeze(loaded.model.eval())  # as after a run
        if leads and trainer.step == 0 and not place.existed:
            shutil.rmtree(place.directory, ignore_errors=True)
        if is_out_of_memory(error):
            raise OutOfMemory(memory_advice(trainer, config, table)) from error
        raise
    if trainer.streaming is None:
        trainer.put_on.close()
    loaded.model.eval()
    record = run_record(config, trainer, loaded, prepared, table, time.perf_counter() - started)
    run = Run(
        directory=place.directory,
        give=lambda: _model_of(config, trainer, loaded),
        tokenizer=loaded.tokenizer,
        table=table,
        record=record,
        rows=tuple(trainer.metrics.rows),
        leads=leads,
    )
    if leads:
        _leave(strategy_class, trainer, loaded, run, config.seed)
    trainer.ranks.wait()
    if not loaded.origins:  # it lay in memory as a whole before: put it together again at once
        _ = run.model
    return run


def _model_of(config: TrainConfig, trainer: Trainer, loaded: Loaded) -> Any:
    """The trained model in one piece."""
    streaming = trainer.streaming
    if streaming is not None:
        whole = config.residency == "device" and streaming.exact
        streaming.remove(trainer.device if whole else torch.device("cpu"))
        trainer.put_on.close()
    return loaded.model if trainer.attached is None else trainer.attached.wrapper


def _keeps_on_the_heap(trainer: Trainer, config: TrainConfig) -> bool:
    """Do activations that autograd saves stay in the C heap until backward comes by?"""
    recomputed = trainer.streaming is not None or recomputes(config, trainer.units)
    return trainer.device.type == "cpu" and not recomputed and not config.compile


def _leave(strategy_class: type[Strategy], trainer: Trainer, loaded: Loaded, run: Run, seed: int) -> None:
    """What a finished run leaves in its directory."""
    if trainer.streaming is not None and loaded.origins:
        value = trainer.streaming.value
        export_files(loaded, run.directory / "model", trained=trainer.trained, seed=seed, value=value)
    elif trainer.attached is None:
        values = None if trainer.streaming is None else trainer.streaming.values
        export(loaded, run.directory / "model", trained=trainer.trained, seed=seed, values=values)
    else:
        export_adapter(loaded, trainer.attached, run.directory / "model")
    (run.directory / "run.json").write_text(json.dumps(run.record, indent=1, allow_nan=False) + "\n")
    card = model_card(run.record, paper=strategy_class.paper, adapter=strategy_class.adapts)
    (run.directory / "README.md").write_text(card)
    save_plots(run)


# -- settings to pieces ----------------------------------------------------------------------------------------------


def arrange(config: TrainConfig, prepared: Prepared, processes: int = 1) -> Arrangement:
    """Which rows each step sees; the processes divide its micro-batches among themselves."""
    epochs = config.epochs if config.epochs is not None else (None if config.steps is not None else 1.0)
    lengths, accum = np.diff(prepared.train.offsets), config.accum * processes
    if config.packing:
        capacity = prepared.seq_len
        return Packed(lengths, seed=config.seed, batch=config.batch, accum=accum, epochs=epochs, capacity=capacity)
    kind = Grouped if config.group_by_length else Arrangement
    return kind(lengths, seed=config.seed, batch=config.batch, accum=accum, epochs=epochs)


def _pace(config: TrainConfig, strategy: type[Strategy], arrangement: Arrangement) -> Pace:
    steps = arrangement.steps
    return Pace(
        seed=config.seed,
        steps=int(config.steps or 0) if steps is None else steps,
        batch=config.batch,
        every=config.every if "every" in strategy.reads else None,
        lr=config.lr,
        schedule=config.schedule,
        warmup=config.warmup,
        clip=config.clip,
        eval_every=config.eval_every,
        save_every=config.save_every,
        keep=config.keep,
        keep_best=config.keep_best,
    )


def _within_vocabulary(prepared: Prepared, rows: int) -> Prepared:
    """The data for a model with that many embeddings. Padding is read by nobody: one beyond them becomes the last.

    Raises: BadInput when a token is beyond them; a GPU would say no more than that an assertion failed.
    """

    def checked(encoded: Encoded) -> Encoded:
        top = int(encoded.ids.max(initial=0))
        if top >= rows:
            raise BadInput(
                f"the tokenizer gives token {top}, the model has {rows} embeddings: expected the model's own "
                "tokenizer, or a model whose embeddings were resized to it"
            )
        return replace(encoded, pad_id=min(encoded.pad_id, rows - 1))

    heldout = None if prepared.heldout is None else checked(prepared.heldout)
    return replace(prepared, train=checked(prepared.train), heldout=heldout)


def _load_dtype(config: TrainConfig) -> str:
    return "float32" if config.weights == "fp32" else config.dtype


def _seq_len(config: TrainConfig, loaded: Loaded, say: Callable[[str], None]) -> int:
    """The asked length, at most what the model's positions allow."""
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.seq_len > limit:
        say(f"note: --seq-len {config.seq_len} is cut to the model's {limit} positions")
        return int(limit)
    return config.seq_len


def slug(name: str) -> str:
    """A model's name as part of a path: letters, digits, dots and dashes."""
    base = Path(name).name if Path(name).exists() else name
    return re.sub(r"[^A-Za-z0-9.]+", "-", base.removesuffix(".gguf")).strip("-.").lower() or "model"


# -- telling -----------------------------------------------------------------------------------------------------------


def _speaker(config: TrainConfig) -> Callable[[str], None]:
    return lambda message: notice(message, quiet=config.quiet)


def _reporter(
    bar: Any, say: Callable[[str], None], steps: int, trackers: Sequence[Tracker]
) -> Callable[[dict[str, Any]], None]:
    """Hands rows on, and shows them on the bar or, where there is no terminal, as about twenty lines over the run."""
    stride = max(1, steps // 20)

    def show(row: dict[str, Any]) -> None:
        for tracker in trackers if row else ():
            tracker.log(row)
        if row.get("split") == "eval":
            weights = row.get("weights", "exact")
            read = "" if weights == "exact" else f" (frozen blocks in {weights})"
            say(f"step {row['step']}: held-out loss {row['loss']:.4f}{read}")
        elif row:
            loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
            blocks = spans(row["active_blocks"])
            bar.update(row["step"] - bar.n)
            bar.set_postfix_str(
                f"loss {loss}, {row['tokens_per_s']:.0f} tok/s, {row['mem_bytes'] / 1e9:.2f} GB, blocks {blocks}"
            )
            if bar.disable and (row["step"] % stride == 0 or row["step"] == steps):
                say(f"step {row['step']}/{steps}: loss {loss}, {row['tokens_per_s']:.0f} tokens/s, blocks {blocks}")

    return show

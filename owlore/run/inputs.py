"""Everything that a run starts from: device, model, data, adapter and layer table, each known to be usable."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from htsr import files
from htsr.console import notice
from htsr.errors import BadInput
from owlore.blocks import ModelParts, find_parts, freeze
from owlore.config import TrainConfig
from owlore.data.arrange import Arrangement, Grouped
from owlore.data.files import locate_data
from owlore.data.packing import Packed
from owlore.data.prepare import Prepared, prepare
from owlore.data.tokenise import Encoded
from owlore.injection import InjectedAdapter
from owlore.io.trackers import check_trackers
from owlore.kernels.cross_entropy import IGNORED
from owlore.layer_table import find_table, floor_of, scanned_table
from owlore.models.loading import Loaded, load, pick_device
from owlore.run.directory import RunDirectory, find_directory
from owlore.settings import placement_of, resolve
from owlore.strategies import PrepareContext, Strategy
from owlore.training.distributed import Ranks
from owlore.training.loss import CausalLoss
from owlore.training.trainer import collated

if TYPE_CHECKING:
    from htsr import LayerTable


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What a run starts from.

    Attributes:
        config: the settings, with the method's defaults filled in.
        strategy_class: the method.
        directory: where the run is written, and the checkpoint that it goes on from.
        device: where the model computes.
        loaded: the model, its tokenizer and its checkpoint.
        prepared: the encoded data.
        injected: the adapter that the method put into the model, if any.
        parts: the model's parts, the adapter among them.
        table: the layer table, None where nothing is sampled.
        ranks: the processes that train together.
        notify: is given what the user should know, one line at a time.
    """

    config: TrainConfig
    strategy_class: type[Strategy]
    directory: RunDirectory
    device: torch.device
    loaded: Loaded
    prepared: Prepared
    injected: InjectedAdapter | None
    parts: ModelParts
    table: LayerTable | None
    ranks: Ranks
    notify: Callable[[str], None]


def open_inputs(config: TrainConfig, *, ranks: Ranks, model: Any, data: Any, tokenizer: Any, table: Any) -> RunInputs:
    """Load and check what `config` names; nothing is written.

    Rank 0 prepares data and table first, and the others find them in its caches.

    Args:
        config: the settings.
        ranks: the processes that train together.
        model: a module, or a name that replaces `config.model`; None for what `config` names.
        data: rows, or a name that replaces `config.data`; None for what `config` names.
        tokenizer: the tokenizer; None for the model's own.
        table: a layer table; None for what `config` names.

    Raises:
        HtsrError: the subclass whose exit code fits: a wrong setting, a model, data or table that cannot be used.
    """
    model = config.model if model is None else model
    data = config.data if data is None else data
    notify = partial(notice, quiet=config.quiet or not ranks.leads)
    config = replace(config, quiet=config.quiet or not ranks.leads)
    config, strategy_class = resolve(config)
    check_trackers(config.log_to)
    for named in (data, config.eval_data):
        if isinstance(named, str | Path):
            locate_data(named)  # a wrong path is said now, not after a large model has been loaded
    directory = find_directory(config, slug(str(model) if isinstance(model, str | Path) else type(model).__name__))
    device, streams = pick_device(ranks.device_name(config.device)), placement_of(config).streams
    loaded = load(
        model,
        dtype="float32" if config.weights == "fp32" else config.dtype,
        attn=config.attn,
        device=torch.device("cpu") if streams else device,
        tokenizer=tokenizer,
        leave=notify if streams else None,
    )
    freeze(loaded.model)
    with ranks.lead_first():
        prepared = prepare(
            data,
            loaded.tokenizer,
            seq_len=_seq_len(config, loaded, notify),
            eval_data=config.eval_data,
            seed=config.seed,
            cache=files.cache_directory("owlore") / "tokens",
        )
        for line in prepared.report.shown():
            notify(line)
    prepared = _within_vocabulary(prepared, loaded.model.get_input_embeddings().weight.shape[0])
    injected = _inject(config, strategy_class, loaded, prepared, directory, device)
    parts = find_parts(loaded.model)
    with ranks.lead_first():
        found = find_table(
            table if table is not None else (config.table if strategy_class.table is not None else None),
            num_blocks=parts.num_blocks,
            weights_sha256=loaded.weights_sha256,
            notify=notify,
            scan=lambda: scanned_table(
                model, loaded.tokenizer, weights_sha256=loaded.weights_sha256, notify=notify, quiet=config.quiet
            ),
        )
    if found is not None and config.floor is None and (floor := floor_of(found)):
        notify(f"note: the table was made with floor {floor:g}, which this run keeps; --floor 0 leaves it out")
    if (config.active or 0) > parts.num_blocks:
        notify(f"note: --active got {config.active}, the model has {parts.num_blocks} blocks: all are always trained")
    return RunInputs(
        config=config, strategy_class=strategy_class, directory=directory, device=device, loaded=loaded,
        prepared=prepared, injected=injected, parts=parts, table=found, ranks=ranks, notify=notify,
    )  # fmt: skip


def arrange(config: TrainConfig, prepared: Prepared, processes: int = 1) -> Arrangement:
    """Decide which rows each step sees.

    Args:
        config: the settings.
        prepared: the encoded data.
        processes: processes that divide a step's micro-batches among themselves.
    """
    epochs = config.epochs if config.epochs is not None else (None if config.steps is not None else 1.0)
    lengths, accum = np.diff(prepared.train.offsets), config.accum * processes
    if config.packing:
        capacity = prepared.seq_len
        return Packed(lengths, seed=config.seed, batch=config.batch, accum=accum, epochs=epochs, capacity=capacity)
    kind = Grouped if config.group_by_length else Arrangement
    return kind(lengths, seed=config.seed, batch=config.batch, accum=accum, epochs=epochs)


def _inject(
    config: TrainConfig,
    strategy_class: type[Strategy],
    loaded: Loaded,
    prepared: Prepared,
    directory: RunDirectory,
    device: torch.device,
) -> InjectedAdapter | None:
    """Let the method put its adapter into the loaded model, if it has one; nothing is trainable afterwards."""
    arrangement = arrange(config, prepared)

    def batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
        every = (part for step in itertools.count(1) for part in arrangement.step(step))
        for part in itertools.islice(every, count):
            yield collated(prepared.train, part).on(device)

    saved = None if directory.saved is None else directory.saved.state.get("notes")
    context = PrepareContext(
        options=config.set or {}, seed=config.seed, batches=batches, loss=_mean_loss(loaded.model), saved=saved
    )
    injected = strategy_class.prepare(loaded.model, context)
    freeze(loaded.model)
    return injected


def _mean_loss(model: Any) -> Callable[[torch.nn.Module, Any], torch.Tensor]:
    """The mean loss a trained token, as a function of this model and a batch."""
    causal = lru_cache(CausalLoss)  # made when it is first needed: most methods need no loss before step 1

    def loss(asked: torch.nn.Module, batch: Any) -> torch.Tensor:
        assert asked is model
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        return causal(model)(**batch) / max(1, tokens)

    return loss


def _within_vocabulary(prepared: Prepared, rows: int) -> Prepared:
    """The data for a model with `rows` embeddings; a padding token beyond them, which is masked, becomes the last one.

    Raises:
        BadInput: a token is beyond them. (A GPU would report a failed assertion.)
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


def _seq_len(config: TrainConfig, loaded: Loaded, notify: Callable[[str], None]) -> int:
    """`--seq-len`, cut to the model's positions."""
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.seq_len > limit:
        notify(f"note: --seq-len {config.seq_len} is cut to the model's {limit} positions")
        return int(limit)
    return config.seq_len


def slug(name: str) -> str:
    """A model's name as part of a path: letters, digits, dots and dashes."""
    base = Path(name).name if Path(name).exists() else name
    return re.sub(r"[^A-Za-z0-9.]+", "-", base.removesuffix(".gguf")).strip("-.").lower() or "model"

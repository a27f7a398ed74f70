"""The backend of a model whose frozen blocks are streamed from the host or are quantised."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from htsr.errors import UsageError
from owlore.blocks import ModelParts
from owlore.data.batches import MicroBatch
from owlore.models.loading import Loaded
from owlore.models.meta_loading import candidates
from owlore.optim import RotatingOptimizer, UpdateSpec
from owlore.patches import PatchStack
from owlore.residency.block_chain import BlockChain
from owlore.residency.boundaries import Boundaries
from owlore.residency.build import StoredName, fill_from_checkpoint, fill_from_modules
from owlore.residency.copy_queue import open_copy_queue
from owlore.residency.exact_weights import Overlay
from owlore.residency.formats import FORMATS
from owlore.residency.host_embedding import HostEmbedding
from owlore.residency.pinned import Pin, pageable, pin
from owlore.residency.placement import Placement
from owlore.residency.residency import Residency
from owlore.training.backend import active_blocks, copy_into, trains_embeddings
from owlore.training.loss import CausalLoss, evaluation_mode
from owlore.training.streamed_step import RandomState, StreamedStep


@dataclass(kw_only=True)
class StreamedBackend:
    """The backend of blocks that are streamed or quantised; `connect` has to be called before the first step.

    Attributes:
        parts: the model's parts.
        residency: the blocks' weights.
        chain: the blocks' forwards.
        boundaries: the hidden states that backward starts from.
        overlay: exact weights that the checkpoint does not hold.
        embedding: the input embedding, where it stays on the host.
        frozen: format of frozen blocks by its option name.
    """

    parts: ModelParts
    residency: Residency
    chain: BlockChain
    boundaries: Boundaries
    overlay: Overlay
    embedding: HostEmbedding | None
    frozen: str
    _step: StreamedStep | None = None

    def connect(self, loss: CausalLoss, optimizer: RotatingOptimizer, *, compiled: bool = False) -> None:
        """Take the loss and the optimizer, and check that the model can be streamed.

        Args:
            loss: gives the summed loss of a micro-batch.
            optimizer: takes the gradients.
            compiled: whether the blocks' forwards are compiled.

        Raises:
            BadInput: the model's blocks are no chain.
            UsageError: the blocks are compiled and draw random numbers.
        """
        self._step = StreamedStep(loss, optimizer, self.residency, self.chain, self.boundaries, self.embedding)
        ids = torch.arange(8, device=self.residency.copy_queue.device)[None]
        with evaluation_mode(loss.model):
            self.chain.check(lambda: loss.outputs(ids))
            if compiled and self._draws_random_numbers(lambda: loss.outputs(ids), loss.model):
                raise UsageError(
                    "got --compile with streamed blocks that draw random numbers (dropout), expected blocks that draw "
                    "none: compiled, the recomputation would draw others; leave --compile out"
                )

    @torch.no_grad()
    def _draws_random_numbers(self, forward: Callable[[], Tensor], model: nn.Module) -> bool:
        random = RandomState(0, self.residency.copy_queue.device)
        before = random.state
        model.train()
        with random:
            forward()
        return not torch.equal(before, random.state)

    @property
    def step(self) -> StreamedStep:
        """The step of the connected loss and optimizer."""
        assert self._step is not None, "StreamedBackend.connect comes first"
        return self._step

    @property
    def exact(self) -> bool:
        """Whether frozen blocks are read with their own bits."""
        return self.residency.store.exact

    def set_active(self, rules: Mapping[str, UpdateSpec]) -> None:
        """Give the active blocks memory of their own; backward reaches down to the lowest of them."""
        active, embeddings_too = active_blocks(self.parts, rules), trains_embeddings(self.parts, rules)
        self.residency.set_active(active)
        inputs, head = ({name for name, _ in self.parts.groups[group]} for group in ("embeddings", "head"))
        outside = {name: p for name, p in self._outside().items() if name in rules}
        tied = embeddings_too and bool(inputs & head & outside.keys())
        lowest = min(active, default=self.parts.num_blocks)
        deferred = list(outside.values()) if tied else ()
        self.step.set_depth(lowest, trains_embeddings=embeddings_too, deferred=deferred)

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Begin to read these blocks, which are drawn next, where they come from a file."""
        self.residency.prefetch(blocks)

    def gather(self, batches: Mapping[int, MicroBatch], tokens: int, *, seed: int, step: int) -> Tensor:
        """Give the optimizer the gradients of the micro-batches; return the share of each in the mean loss."""
        return self.step.gather(batches, tokens, seed=seed, step=step)

    def losses(self, batches: Iterable[MicroBatch], *, exact: bool) -> Iterable[Tensor]:
        """Summed loss of each micro-batch, with the weights as they are trained against or as they are exported."""
        with self.residency.visit_exact_weights() if exact else nullcontext():
            yield from self.step.evaluate(batches)

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Exact values of parameters by name."""
        wanted, outside = list(names), self._outside()
        inside = self.residency.values(name for name in wanted if name not in outside)
        return {name: outside[name].data if name in outside else inside[name] for name in wanted}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters to these values."""
        outside = self._outside()
        copy_into(outside, {name: tensor for name, tensor in weights.items() if name in outside})
        self.residency.put({name: tensor for name, tensor in weights.items() if name not in outside})

    def _outside(self) -> dict[str, nn.Parameter]:
        """The parameters outside the blocks."""
        return self.parts.parameters((), self.parts.groups)

    def record(self) -> dict[str, Any]:
        """For run.json: the bytes that are held on host and device, and what was loaded."""
        store, queue = self.residency.store, self.residency.copy_queue
        host = {"store": store.host_bytes(), "locked": store.pinned_bytes(), "overlay": self.overlay.num_bytes(),
                "boundaries": self.boundaries.host_bytes(),
                "embedding": 0 if self.embedding is None else self.embedding.num_bytes()}  # fmt: skip
        return {
            "frozen": self.frozen,
            "train_loss_weights": "exact" if self.exact else f"drawn blocks exact, frozen blocks {self.frozen}",
            "device_bytes": self.residency.device_bytes(),
            "host_bytes": host,
            "loads": queue.loads,
            "loaded_bytes": queue.loaded_bytes,
            "seconds": queue.seconds(),
        }

    def reassemble(self, device: torch.device) -> None:
        """Put the model together on `device` with its exact weights."""
        self.residency.restore()
        self.parts.model.to(device)


def open_streamed_backend(
    placement: Placement,
    parts: ModelParts,
    loaded: Loaded,
    *,
    always_on: Collection[str],
    device: torch.device,
    directory: Path,
    notify: Callable[[str], None],
    patches: PatchStack,
    pin_memory: Pin | None = None,
) -> StreamedBackend:
    """Move the blocks of a model, in host memory or left in their files, to the store and the rest to the device.

    Args:
        placement: where the blocks live and in which format.
        parts: the model's parts.
        loaded: the model and its checkpoint.
        always_on: groups outside the blocks that are always trained.
        device: where the model computes.
        directory: of the run; exact weights of trained blocks are kept there where memory may not hold them.
        notify: is told what is noteworthy.
        patches: the stack on which forwards of blocks, linear maps and the embedding are replaced.
        pin_memory: allocates host memory, where that is not to be the device's usual way.
    """
    copy_queue = open_copy_queue(device)
    pin_memory = pin_memory or (pin if device.type == "cuda" else pageable)
    residency = Residency(
        parts.modules,
        [[name for name, _ in block] for block in parts.blocks],
        form=FORMATS[placement.frozen],
        resident=placement.resident_blocks(parts.num_blocks),
        copy_queue=copy_queue,
        pin=pin_memory,
        patches=patches,
    )
    lossy, read = placement.frozen != "bf16", loaded.source.read
    overlay = Overlay(_overlay_directory(residency, parts, directory, notify) if lossy else None)
    if loaded.origins:
        fill_from_checkpoint(residency, origins=loaded.origins, read=read, overlay=overlay)
    elif kept := fill_from_modules(residency, stored_name=_finder(parts.model, loaded), read=read, overlay=overlay):
        notify(
            f"note: the checkpoint does not hold {kept} of {parts.num_blocks} blocks bit for bit as they are trained; "
            "their exact weights stay in memory"
        )
    if pin_memory is not pageable and (num_pageable := residency.store.num_pageable()):
        notify(
            f"note: {num_pageable} blocks could not be page-locked (ulimit -l?); they stay in pageable memory and are "
            "copied through a few pinned buffers, which is slower"
        )
    on_host = placement.residency == "host" and "embeddings" not in always_on
    return StreamedBackend(
        parts=parts,
        residency=residency,
        embedding=_move_rest(parts, device, patches, embedding_on_host=on_host),
        chain=BlockChain(parts.modules, residency.visit, patches),
        boundaries=Boundaries(copy_queue, offload=placement.offload, pin=pin_memory),
        overlay=overlay,
        frozen=placement.frozen,
    )


def _finder(model: nn.Module, loaded: Loaded) -> StoredName:
    """Finds a parameter in the checkpoint, whose names may lack or add the base model's prefix."""
    stored = {tensor.name for tensor in loaded.source.tensors}
    return lambda name: next((candidate for candidate in candidates(model, name) if candidate in stored), None)


def _move_rest(
    parts: ModelParts, device: torch.device, patches: PatchStack, *, embedding_on_host: bool
) -> HostEmbedding | None:
    """Move everything outside the blocks to the device; a frozen embedding may stay on the host."""
    inside = {id(module) for block in parts.modules for module in block.modules()}
    embedding = _untied_embedding(parts) if embedding_on_host else None
    on_host = set() if embedding is None else {id(module) for module in embedding.modules()}
    for module in parts.model.modules():
        if id(module) in on_host:
            continue
        if id(module) not in inside:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.to(device), name not in module._non_persistent_buffers_set)
    return None if embedding is None else HostEmbedding(embedding, device, patches)


def _untied_embedding(parts: ModelParts) -> nn.Module | None:
    """The input embedding, None where the head shares its weight."""
    access: Any = getattr(parts.model, "get_input_embeddings", None)
    embedding = None if access is None else access()
    head = {id(p) for _, p in parts.groups["head"]}
    if not isinstance(embedding, nn.Module) or any(id(p) in head for p in embedding.parameters()):
        return None
    return embedding


def _overlay_directory(
    residency: Residency, parts: ModelParts, directory: Path, notify: Callable[[str], None]
) -> Path | None:
    """Where trained blocks are kept when memory may not hold all of them beside the store; None for memory."""
    blocks = sum(p.numel() * p.element_size() for block in parts.blocks for _, p in block)
    store = sum(residency.store.layouts[block].num_bytes for block in residency.store.streamed)
    if store + blocks <= available_memory() / 2:
        return None
    notify(
        f"note: trained blocks are kept in {directory / 'overlay'} while the run lasts; memory may not hold all "
        f"{blocks / 1e9:.1f} GB"
    )
    return directory / "overlay"


def available_memory() -> int:
    """Bytes of memory that are available; a very large number where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 1 << 62

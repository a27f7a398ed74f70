"""The backend of a model whose frozen blocks do not all lie on the device, or not in their own format.

A placement becomes a store, a few device buffers and a walk over the blocks; the trainer asks the backend for
gradients, losses and exact weights.
"""

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
from owlore.residency.build import empty_residency, move_in, read_in
from owlore.residency.copy_queue import CopyQueue, open_copy_queue
from owlore.residency.exact_weights import Overlay
from owlore.residency.formats import FORMATS
from owlore.residency.host_embedding import HostEmbedding
from owlore.residency.pinned import Pin, pin, unlocked
from owlore.residency.placement import Placement
from owlore.residency.residency import Residency
from owlore.training.backend import active_blocks, copy_into, trains_embeddings
from owlore.training.loss import CausalLoss
from owlore.training.streamed_step import RandomNumbers, StreamedStep


@dataclass(kw_only=True)
class StreamedBackend:
    """The backend of blocks that are streamed or quantised. `connect` has to follow before the first step."""

    parts: ModelParts
    residency: Residency
    chain: BlockChain
    boundaries: Boundaries
    overlay: Overlay
    embedding: HostEmbedding | None
    frozen: str
    _walk: StreamedStep | None = None

    def connect(self, loss: CausalLoss, optimizer: RotatingOptimizer, *, compiled: bool = False) -> None:
        """Raises: BadInput for a model whose blocks are no chain, UsageError for compiled blocks with dropout."""
        self._walk = StreamedStep(loss, optimizer, self.residency, self.chain, self.boundaries, self.embedding)
        ids = torch.arange(8, device=self.residency.copies.device)[None]
        training = loss.model.training
        loss.model.eval()
        try:
            self.chain.check(lambda: loss.outputs(ids))
            if compiled and self._draws_numbers(lambda: loss.outputs(ids), loss.model):
                raise UsageError(
                    "got --compile with streamed blocks that draw random numbers (dropout), expected blocks that draw "
                    "none: compiled, the recomputation would draw others; leave --compile out"
                )
        finally:
            loss.model.train(training)

    @torch.no_grad()
    def _draws_numbers(self, forward: Callable[[], Tensor], model: nn.Module) -> bool:
        random = RandomNumbers(0, self.residency.copies.device)
        before = random.state
        model.train()
        with random:
            forward()
        return not torch.equal(before, random.state)

    @property
    def walk(self) -> StreamedStep:
        assert self._walk is not None, "StreamedBackend.connect comes first"
        return self._walk

    # -- what the trainer asks for -----------------------------------------------------------------------------------

    def set_active(self, rules: Mapping[str, UpdateSpec]) -> None:
        """Give the active blocks memory of their own; backward reaches down to the lowest of them."""
        drawn, bottom = active_blocks(self.parts, rules), trains_embeddings(self.parts, rules)
        self.residency.set_active(drawn)
        inputs, head = ({name for name, _ in self.parts.groups[group]} for group in ("embeddings", "head"))
        outside = {name: p for name, p in self.parts.parameters((), self.parts.groups).items() if name in rules}
        shared = bottom and bool(inputs & head & outside.keys())
        lowest = min(drawn, default=self.parts.num_blocks)
        self.walk.aim(lowest, bottom=bottom, held=list(outside.values()) if shared else ())

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Begin to read these blocks, which are drawn next, where they come from a file."""
        self.residency.exact_weights.expect(set(blocks) - self.residency.live)

    def gather(self, batches: Mapping[int, MicroBatch], tokens: int, *, seed: int, step: int) -> Tensor:
        """Give the optimizer the gradients of the micro-batches; return the share of each in the mean loss."""
        return self.walk.gather(batches, tokens, seed=seed, step=step)

    def losses(self, batches: Iterable[MicroBatch], *, exact: bool) -> Iterable[Tensor]:
        """Summed loss of each micro-batch, with the weights as they are trained against or as they are exported."""
        with self.residency.exactly() if exact else nullcontext():
            yield from self.walk.evaluate(batches)

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Exact values of parameters by name, wherever they live."""
        wanted = list(names)
        outside = self.parts.parameters((), self.parts.groups)
        inside = self.residency.values(name for name in wanted if name not in outside)
        return {name: outside[name].data if name in outside else inside[name] for name in wanted}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters to these values, wherever they live."""
        outside = self.parts.parameters((), self.parts.groups)
        copy_into(outside, {name: tensor for name, tensor in weights.items() if name in outside})
        self.residency.put({name: tensor for name, tensor in weights.items() if name not in outside})

    @property
    def exact(self) -> bool:
        """Are frozen blocks read with their own bits?"""
        return self.residency.store.exact

    # -- what is reported --------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """For run.json: what is held where, and what was loaded."""
        store, copies = self.residency.store, self.residency.copies
        host = {"store": store.host_bytes(), "locked": store.locked(), "overlay": self.overlay.num_bytes(),
                "boundaries": self.boundaries.host_bytes(),
                "embedding": 0 if self.embedding is None else self.embedding.num_bytes()}  # fmt: skip
        return {
            "frozen": self.frozen,
            "train_loss_weights": "exact" if self.exact else f"drawn blocks exact, frozen blocks {self.frozen}",
            "device_bytes": self.residency.device_bytes(),
            "host_bytes": host,
            "loads": copies.loads,
            "loaded_bytes": copies.loaded_bytes,
            "seconds": copies.seconds(),
        }

    def reassemble(self, device: torch.device) -> None:
        """Put the model together on `device`, its weights exact; its forwards are its own again before."""
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
    copies: CopyQueue | None = None,
    lock: Pin | None = None,
) -> StreamedBackend:
    """Take the blocks of a model in host memory, or those left in their files, apart; the rest moves to the device.

    Args:
        placement: where the blocks live and in which format.
        parts: the model's parts.
        loaded: the model and its checkpoint.
        always_on: groups outside the blocks that are always trained.
        device: where the model computes.
        directory: of the run; exact weights of trained blocks are kept there where memory may not hold them.
        notify: is told what is noteworthy.
        patches: the stack on which forwards of blocks, linear maps and the embedding are replaced.
        copies: how the device is reached, where that is not its usual way.
        lock: how host memory is locked, where that is not the device's usual way.
    """
    copies = copies or open_copy_queue(device)
    lock = lock or (pin if device.type == "cuda" else unlocked)
    residency = empty_residency(
        parts.modules,
        [[name for name, _ in block] for block in parts.blocks],
        form=FORMATS[placement.frozen],
        resident=placement.resident_blocks(parts.num_blocks),
        copies=copies,
        pin=lock,
        num_buffers=2,
        patches=patches,
    )
    lossy = placement.frozen != "bf16"
    overlay = Overlay(_overlay_directory(residency, parts, directory, notify) if lossy else None)
    if loaded.origins:
        read_in(residency, origins=loaded.origins, read=loaded.source.read, overlay=overlay)
    elif kept := move_in(residency, find=_finder(parts.model, loaded), read=loaded.source.read, overlay=overlay):
        notify(
            f"note: the checkpoint does not hold {kept} of {parts.num_blocks} blocks bit for bit as they are trained; "
            "their exact weights stay in memory"
        )
    if lock is not unlocked and (refused := residency.store.refused()):
        notify(
            f"note: {refused} blocks could not be page-locked (ulimit -l?); they stay mapped and travel through a "
            "pinned ring, which is slower"
        )
    on_host = placement.residency == "host" and "embeddings" not in always_on
    return StreamedBackend(
        parts=parts,
        residency=residency,
        embedding=_move_rest(parts, device, patches, embedding_on_host=on_host),
        chain=BlockChain(parts.modules, residency.visit, patches),
        boundaries=Boundaries(copies, offload=placement.offload, pin=lock),
        overlay=overlay,
        frozen=placement.frozen,
    )


def _finder(model: nn.Module, loaded: Loaded) -> Any:
    """A parameter's name -> its name in the checkpoint, which may lack or add the base model's prefix."""
    stored = {tensor.name for tensor in loaded.source.tensors}
    return lambda name: next((candidate for candidate in candidates(model, name) if candidate in stored), None)


def _move_rest(
    parts: ModelParts, device: torch.device, patches: PatchStack, *, embedding_on_host: bool
) -> HostEmbedding | None:
    """Move everything outside the blocks to the device; a frozen embedding may stay on the host."""
    inside = {id(module) for block in parts.modules for module in block.modules()}
    table = _untied_embedding(parts) if embedding_on_host else None
    left = set() if table is None else {id(module) for module in table.modules()}
    for module in parts.model.modules():
        if id(module) in left:
            continue
        if id(module) not in inside:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.to(device), name not in module._non_persistent_buffers_set)
    return None if table is None else HostEmbedding(table, device, patches)


def _untied_embedding(parts: ModelParts) -> nn.Module | None:
    """The input embedding, None where the head shares its weight."""
    access: Any = getattr(parts.model, "get_input_embeddings", None)
    table = None if access is None else access()
    head = {id(p) for _, p in parts.groups["head"]}
    if not isinstance(table, nn.Module) or any(id(p) in head for p in table.parameters()):
        return None
    return table


def _overlay_directory(
    residency: Residency, parts: ModelParts, directory: Path, notify: Callable[[str], None]
) -> Path | None:
    """Where trained blocks are kept when memory may not hold all of them beside the store; None for memory."""
    whole = sum(p.numel() * p.element_size() for block in parts.blocks for _, p in block)
    store = sum(residency.store.layouts[block].num_bytes for block in residency.store.streamed)
    if store + whole <= available_memory() / 2:
        return None
    notify(
        f"note: trained blocks are kept in {directory / 'overlay'} while the run lasts; memory may not hold all "
        f"{whole / 1e9:.1f} GB"
    )
    return directory / "overlay"


def available_memory() -> int:
    """Bytes of memory that are free for the asking."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 1 << 62

"""Training a model whose frozen blocks do not all lie on the device, or not in their own format.

This is where `--residency`, `--resident-share`, `--frozen` and `--offload-activations` become a store, slots and a walk
over the blocks; the loop asks it for gradients, losses and exact weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from htsr.errors import UsageError
from owlore.blocks import Units
from owlore.config import TrainConfig
from owlore.data.batches import MicroBatch
from owlore.layer_table import Say
from owlore.models.loading import Loaded
from owlore.models.meta_loading import candidates
from owlore.optim import RotatingOptimizer, Rule
from owlore.residency.boundaries import Boundaries
from owlore.residency.build import empty_residency, move_in, read_in, resident_blocks
from owlore.residency.chain import Chain
from owlore.residency.formats import FORMATS
from owlore.residency.host_embedding import HostEmbedding
from owlore.residency.masters import Overlay
from owlore.residency.pinned import Pin, pin, unlocked
from owlore.residency.ports import Port, open_port
from owlore.residency.run import Residency
from owlore.training.loss import CausalLoss
from owlore.training.streamed_step import BlockMajor, RandomNumbers


def streams(config: TrainConfig) -> bool:
    """Do these settings ask for anything but plain blocks on the device?"""
    return config.residency == "host" or config.frozen != "bf16" or config.offload_activations


def check_streaming(config: TrainConfig, *, adapts: bool = False) -> None:
    """Raises: UsageError for settings that do not go together."""
    if config.resident_share and config.residency != "host":
        raise UsageError("--resident-share was given without --residency host; on the device all blocks are resident")
    if config.compile and config.frozen != "bf16":
        raise UsageError(
            f"got --compile with --frozen {config.frozen}, expected one of them: a quantised block is not compiled"
        )
    if adapts and streams(config):
        raise UsageError(
            f"--residency host, --frozen and --offload-activations are for methods that train the model's own weights, "
            f"not for {config.method}; leave them out"
        )


@dataclass(kw_only=True)
class Streaming:
    """The streamed blocks of a run. `connect` has to follow before the first step."""

    units: Units
    residency: Residency
    chain: Chain
    boundaries: Boundaries
    overlay: Overlay
    embedding: HostEmbedding | None
    frozen: str
    _walk: BlockMajor | None = None

    def connect(self, loss: CausalLoss, optimizer: RotatingOptimizer, *, compiled: bool = False) -> None:
        """Raises: BadInput for a model whose blocks are no chain, UsageError for compiled blocks with dropout."""
        self._walk = BlockMajor(loss, optimizer, self.residency, self.chain, self.boundaries, self.embedding)
        ids = torch.arange(8, device=self.residency.port.device)[None]
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
        random = RandomNumbers(0, self.residency.port.device)
        before = random.state
        model.train()
        with random:
            forward()
        return not torch.equal(before, random.state)

    @property
    def walk(self) -> BlockMajor:
        assert self._walk is not None, "Streaming.connect comes first"
        return self._walk

    # -- what the loop asks for --------------------------------------------------------------------------------------

    def settle(self, rules: Mapping[str, Rule]) -> None:
        """Blocks of which something is trained own their weights; backward reaches down to the lowest of them."""
        home = self.units.block_of()
        drawn = {home[name] for name in rules if name in home}
        self.residency.settle(drawn)
        inputs, head = ({name for name, _ in self.units.groups[group]} for group in ("embeddings", "head"))
        outside = {name: p for name, p in self.units.parameters((), self.units.groups).items() if name in rules}
        bottom = any(name in inputs for name in outside)
        shared = bottom and bool(inputs & head & outside.keys())
        lowest = min(drawn, default=self.units.num_blocks)
        self.walk.aim(lowest, bottom=bottom, held=list(outside.values()) if shared else ())

    def expect(self, blocks: Iterable[int]) -> None:
        """These blocks are drawn next: what has to come from a file is read meanwhile."""
        self.residency.masters.expect(set(blocks) - self.residency.live)

    def losses(self, batches: Iterable[MicroBatch], *, exact: bool) -> Iterable[Tensor]:
        """Summed loss of each micro-batch, with the weights as they are trained against or as they are exported."""
        with self.residency.exactly() if exact else nullcontext():
            yield from self.walk.evaluate(batches)

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Exact values of parameters by name, wherever they live."""
        wanted = list(names)
        outside = self.units.parameters((), self.units.groups)
        inside = self.residency.values(name for name in wanted if name not in outside)
        return {name: outside[name].data if name in outside else inside[name] for name in wanted}

    def value(self, name: str) -> Tensor:
        """Exact value of one parameter."""
        return self.values([name])[name]

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters to these values, wherever they live."""
        outside = self.units.parameters((), self.units.groups)
        with torch.no_grad():
            for name in weights.keys() & outside.keys():
                outside[name].copy_(weights[name])
        self.residency.put({name: tensor for name, tensor in weights.items() if name not in outside})

    @property
    def exact(self) -> bool:
        """Are frozen blocks read with their own bits?"""
        return self.residency.store.exact

    # -- what is reported --------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """For run.json: what is held where, and what was loaded."""
        store, port = self.residency.store, self.residency.port
        host = {"store": store.host_bytes(), "locked": store.locked(), "overlay": self.overlay.num_bytes(),
                "boundaries": self.boundaries.host_bytes(),
                "embedding": 0 if self.embedding is None else self.embedding.num_bytes()}  # fmt: skip
        return {
            "frozen": self.frozen,
            "train_loss_weights": "exact" if self.exact else f"drawn blocks exact, frozen blocks {self.frozen}",
            "device_bytes": self.residency.device_bytes(),
            "host_bytes": host,
            "loads": port.loads,
            "loaded_bytes": port.loaded_bytes,
            "seconds": port.seconds(),
        }

    def remove(self, device: torch.device) -> None:
        """Give the model back in one piece on `device`, its weights exact."""
        self.chain.remove()
        if self.embedding is not None:
            self.embedding.remove()
        self.residency.restore()
        self.units.model.to(device)


def open_streaming(
    config: TrainConfig,
    units: Units,
    loaded: Loaded,
    *,
    device: torch.device,
    directory: Path,
    say: Say,
    port: Port | None = None,
    lock: Pin | None = None,
) -> Streaming:
    """Take the blocks of a model in host memory, or those that were left in their files, apart; the rest moves to the
    device.

    port, lock: how the device is reached and host memory locked, where that is not the device's usual way.
    """
    port = port or open_port(device)
    lock = lock or (pin if device.type == "cuda" else unlocked)
    share = config.resident_share if config.residency == "host" else 1.0
    residency = empty_residency(
        units.modules,
        [[name for name, _ in block] for block in units.blocks],
        form=FORMATS[config.frozen],
        resident=resident_blocks(units.num_blocks, share),
        port=port,
        pin=lock,
        num_slots=2,
    )
    overlay = Overlay(_overlay_directory(residency, units, directory, say) if config.frozen != "bf16" else None)
    if loaded.origins:
        read_in(residency, origins=loaded.origins, read=loaded.source.read, overlay=overlay)
    elif kept := move_in(residency, find=_finder(units.model, loaded), read=loaded.source.read, overlay=overlay):
        say(
            f"note: the checkpoint does not hold {kept} of {units.num_blocks} blocks bit for bit as they are trained; "
            "their exact weights stay in memory"
        )
    if lock is not unlocked and (refused := residency.store.refused()):
        say(
            f"note: {refused} blocks could not be page-locked (ulimit -l?); they stay mapped and travel through a "
            "pinned ring, which is slower"
        )
    embedding = _move_rest(config, units, device)
    return Streaming(
        units=units,
        residency=residency,
        chain=Chain(units.modules, residency.visit),
        boundaries=Boundaries(port, offload=config.offload_activations, pin=lock),
        overlay=overlay,
        embedding=embedding,
        frozen=config.frozen,
    )


def _finder(model: nn.Module, loaded: Loaded) -> Any:
    """A parameter's name -> its name in the checkpoint, which may lack or add the base model's prefix."""
    stored = {tensor.name for tensor in loaded.source.tensors}
    return lambda name: next((candidate for candidate in candidates(model, name) if candidate in stored), None)


def _move_rest(config: TrainConfig, units: Units, device: torch.device) -> HostEmbedding | None:
    """Everything outside the blocks goes to the device; an embedding that nobody trains stays where it is."""
    inside = {id(module) for block in units.modules for module in block.modules()}
    table = _embedding_to_leave(config, units)
    left = set() if table is None else {id(module) for module in table.modules()}
    for module in units.model.modules():
        if id(module) in left:
            continue
        if id(module) not in inside:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.to(device), name not in module._non_persistent_buffers_set)
    return None if table is None else HostEmbedding(table, device)


def _embedding_to_leave(config: TrainConfig, units: Units) -> nn.Module | None:
    if config.residency != "host" or "embeddings" in config.always_on:
        return None
    access: Any = getattr(units.model, "get_input_embeddings", None)
    table = None if access is None else access()
    head = {id(p) for _, p in units.groups["head"]}
    if not isinstance(table, nn.Module) or any(id(p) in head for p in table.parameters()):
        return None
    return table


def _overlay_directory(residency: Residency, units: Units, directory: Path, say: Say) -> Path | None:
    """Where trained blocks are kept when memory may not hold all of them beside the store; None for memory."""
    whole = sum(p.numel() * p.element_size() for block in units.blocks for _, p in block)
    store = sum(residency.store.layouts[block].num_bytes for block in residency.store.streamed)
    if store + whole <= available_memory() / 2:
        return None
    say(
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

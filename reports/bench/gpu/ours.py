"""Our trainer on a random model: blocks on the device, or streamed, quantised, offloaded; one object for every row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from shapes import block_weights, filled, skeleton
from torch import Tensor

from owlore.activations.checkpointing import Recompute
from owlore.blocks import find_units, freeze
from owlore.data.batches import MicroBatch
from owlore.kernels.seeds import generator_for
from owlore.optim import RotatingOptimizer, Weights
from owlore.optim.slot import Slot
from owlore.residency.boundaries import Boundaries
from owlore.residency.build import empty_residency
from owlore.residency.chain import Chain
from owlore.residency.formats import FORMATS
from owlore.residency.host_embedding import HostEmbedding
from owlore.residency.masters import Overlay
from owlore.residency.pinned import pin, unlocked
from owlore.residency.ports import open_port
from owlore.residency.run import Residency
from owlore.strategies import STRATEGIES, Hyper
from owlore.training.backend import Backend
from owlore.training.loss import CausalLoss
from owlore.training.resident import ResidentBackend
from owlore.training.rotation import Rotation
from owlore.training.step import train_step
from owlore.training.streamed import StreamedBackend

EVERY = 2  # steps of a period: short, so that L / gamma periods are soon over


class Generated:
    """Masters that stand for a checkpoint file: a block is made again from its seed until it was trained."""

    def __init__(self, make: Callable[[int], Mapping[str, Tensor]]) -> None:
        self._make, self.overlay = make, Overlay()

    def read(self, block: int) -> Mapping[str, Tensor]:
        return self.overlay.get(block) if block in self.overlay else self._make(block)

    def keep(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        self.overlay.put(block, tensors)

    def expect(self, blocks: Iterable[int]) -> None:
        """A generator needs no head start."""


def hyper_of(row: Any, blocks: int) -> Hyper:
    """Uniform draws of gamma blocks, rank 128 (8 for the small shape)."""
    gamma = min(row.gamma, blocks)
    return Hyper(
        seed=0, every=EVERY, draw="exact", inclusion=np.full(blocks, gamma / blocks), always_on=row.always_on,
        rank=row.rank, refresh=None, scale=1.0, weight_decay=0.0, project_always_on=True,
    )  # fmt: skip


class Ours:
    """Takes steps; every gradient can be watched through `optimizer.slots`."""

    def __init__(self, row: Any, device: torch.device, *, blocks: int | None = None) -> None:
        self.row, self.device, self.placement = row, device, row.placement
        streamed = self.placement.streams
        self.model = (skeleton if streamed else filled)(row.shape, device, blocks=blocks)
        self.units = find_units(self.model)
        self.count = self.units.num_blocks
        strategy = STRATEGIES["owlore"](self.units, hyper_of(row, self.count))
        everything = self.units.parameters(range(self.count), self.units.groups)
        self.optimizer = RotatingOptimizer(everything, seed=0, weights=Weights.STOCHASTIC, layers=self.units.modules)
        self.residency = self._stream() if streamed else None
        self.port = None if self.residency is None else self.residency.port
        self.backend = self._resident() if self.residency is None else self._streamed(self.residency)
        set_active = self.backend.set_active
        self.rotation = Rotation(strategy=strategy, optimizer=self.optimizer, every=EVERY, set_active=set_active)
        self.step = 0

    def _resident(self) -> Backend:
        freeze(self.model)
        loss, recompute = CausalLoss(self.model), Recompute(self.units.modules, enabled=True)
        return ResidentBackend(self.units, self.optimizer, loss, self.device, recompute)

    def _streamed(self, residency: Residency) -> Backend:
        lock = pin if self.device.type == "cuda" else unlocked
        backend = StreamedBackend(
            units=self.units,
            residency=residency,
            chain=Chain(self.units.modules, residency.visit),
            boundaries=Boundaries(residency.port, offload=self.placement.offload, pin=lock),
            overlay=Overlay(),
            embedding=self.embedding,
            frozen=self.placement.frozen,
        )
        backend.connect(CausalLoss(self.model), self.optimizer)
        return backend

    def _stream(self) -> Residency:
        placement, row, device = self.placement, self.row, self.device
        lock = pin if device.type == "cuda" else unlocked

        def make(block: int) -> Mapping[str, Tensor]:
            return block_weights(row.shape, block, shapes[block], device)

        with torch.device("meta"):
            shapes = skeleton(row.shape, torch.device("meta"), blocks=self.count).model.layers
        lossy = placement.frozen != "bf16"
        residency = empty_residency(
            self.units.modules,
            [[name for name, _ in block] for block in self.units.blocks],
            form=FORMATS[placement.frozen],
            resident=placement.resident_blocks(self.count),
            port=open_port(device, timed=True),
            pin=lock,
            masters=Generated(make) if lossy else None,
        )
        for block in range(self.count):
            residency.occupy(block, make(block))
        host = placement.residency == "host" and "embeddings" not in row.always_on
        self.embedding = HostEmbedding(self.model.get_input_embeddings(), device) if host else None
        return residency

    def batches(self, step: int) -> list[MicroBatch]:
        """Seeded token ids, every token a target."""
        row, vocabulary = self.row, self.model.config.vocab_size
        stream = generator_for(0, "tokens", step)
        made = [torch.randint(4, vocabulary, (row.batch, row.tokens), generator=stream) for _ in range(row.accum)]
        return [MicroBatch(input_ids=ids, labels=ids, num_trained=ids.numel() - len(ids)) for ids in made]

    def advance(self) -> float:
        """One step; its loss."""
        if self.rotation.is_due(self.step):
            self.rotation.begin(self.step)
        batches = dict(enumerate(self.batches(self.step)))
        result = train_step(self.backend, self.optimizer, batches, step=self.step, lr=1e-4, clip=1.0, seed=0)
        self.step += 1
        assert result.loss is not None
        return result.loss


def gradients(ours: Ours, steps: int) -> list[dict[str, Any]]:
    """Loss and every gradient of some steps, as the optimizer is given them."""
    found = []
    for _ in range(steps):
        if ours.rotation.is_due(ours.step):
            ours.rotation.begin(ours.step)
        seen: dict[str, list[Tensor]] = {}
        for name, slot in ours.optimizer.slots.items():
            _watch(slot, seen.setdefault(name, []))
        loss = torch.tensor(ours.advance())
        found.append({"loss": loss, "gradients": {name: [g.cpu() for g in gs] for name, gs in seen.items()}})
    return found


def _watch(slot: Slot, into: list[Tensor]) -> None:
    """Keep every gradient that the slot is given, as a whole or by its factors."""
    receive, receive_product = Slot.receive.__get__(slot), Slot.receive_product.__get__(slot)

    def take(gradient: Tensor, **settings: Any) -> None:
        into.append(gradient.clone())
        receive(gradient, **settings)

    def take_product(left: Tensor, other: Tensor) -> Tensor | None:
        whole: Tensor | None = receive_product(left, other)
        if whole is None:
            into.append(left.T @ other)
        return whole

    slot.receive, slot.receive_product = take, take_product  # type: ignore[method-assign]

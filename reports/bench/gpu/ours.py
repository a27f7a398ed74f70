"""Our trainer on a random model: blocks on the device, or streamed, quantised, offloaded; one object for every row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from shapes import block_weights, filled, skeleton
from torch import Tensor

from owlore.activations.checkpointing import ActivationCheckpointing
from owlore.blocks import find_parts, freeze
from owlore.data.batches import MicroBatch
from owlore.kernels.seeds import generator_for
from owlore.optim import MasterPolicy, RotatingOptimizer
from owlore.optim.parameter_state import ParameterState
from owlore.residency.block_chain import BlockChain
from owlore.residency.boundaries import Boundaries
from owlore.residency.copy_queue import open_copy_queue
from owlore.residency.exact_weights import Overlay
from owlore.residency.formats import FORMATS
from owlore.residency.host_embedding import HostEmbedding
from owlore.residency.pinned import pageable, pin
from owlore.residency.residency import Residency
from owlore.strategies import STRATEGIES, StrategyConfig
from owlore.training.backend import Backend
from owlore.training.loss import CausalLoss
from owlore.training.resident import ResidentBackend
from owlore.training.rotation import Rotation
from owlore.training.step import train_step
from owlore.training.streamed import StreamedBackend

EVERY = 2  # steps of a period: short, so that L / gamma periods are soon over


class Generated:
    """ExactWeights that stand for a checkpoint file: a block is made again from its seed until it was trained."""

    def __init__(self, make: Callable[[int], Mapping[str, Tensor]]) -> None:
        self._make, self.overlay = make, Overlay()

    def read(self, block: int) -> Mapping[str, Tensor]:
        return self.overlay.get(block) if block in self.overlay else self._make(block)

    def write(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        self.overlay.put(block, tensors)

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Do nothing: weights are generated when they are read."""


def strategy_config(row: Any, blocks: int) -> StrategyConfig:
    """Uniform draws of gamma blocks, rank 128 (8 for the small shape)."""
    gamma = min(row.gamma, blocks)
    return StrategyConfig(
        seed=0, draw="exact", inclusion=np.full(blocks, gamma / blocks), always_on=row.always_on,
        rank=row.rank, refresh=None, scale=1.0, weight_decay=0.0, project_always_on=True,
    )  # fmt: skip


class Ours:
    """Takes steps; every gradient can be watched through `optimizer.states`."""

    def __init__(self, row: Any, device: torch.device, *, blocks: int | None = None) -> None:
        self.row, self.device, self.placement = row, device, row.placement
        streamed = self.placement.streams
        self.model = (skeleton if streamed else filled)(row.shape, device, blocks=blocks)
        self.parts = find_parts(self.model)
        self.count = self.parts.num_blocks
        strategy = STRATEGIES["owlore"](self.parts, strategy_config(row, self.count))
        everything = self.parts.parameters(range(self.count), self.parts.groups)
        self.optimizer = RotatingOptimizer(
            everything, seed=0, policy=MasterPolicy.STOCHASTIC, layers=self.parts.modules
        )
        self.residency = self._stream() if streamed else None
        self.copy_queue = None if self.residency is None else self.residency.copy_queue
        self.backend = self._resident() if self.residency is None else self._streamed(self.residency)
        set_active = self.backend.set_active
        self.rotation = Rotation(strategy=strategy, optimizer=self.optimizer, every=EVERY, set_active=set_active)
        self.step = 0

    def _resident(self) -> Backend:
        freeze(self.model)
        loss, recompute = CausalLoss(self.model), ActivationCheckpointing(self.parts.modules, enabled=True)
        return ResidentBackend(self.parts, self.optimizer, loss, self.device, recompute)

    def _streamed(self, residency: Residency) -> Backend:
        lock = pin if self.device.type == "cuda" else pageable
        backend = StreamedBackend(
            parts=self.parts,
            residency=residency,
            chain=BlockChain(self.parts.modules, residency.visit),
            boundaries=Boundaries(residency.copy_queue, offload=self.placement.offload, pin=lock),
            overlay=Overlay(),
            embedding=self.embedding,
            frozen=self.placement.frozen,
        )
        backend.connect(CausalLoss(self.model), self.optimizer)
        return backend

    def _stream(self) -> Residency:
        placement, row, device = self.placement, self.row, self.device
        lock = pin if device.type == "cuda" else pageable

        def make(block: int) -> Mapping[str, Tensor]:
            return block_weights(row.shape, block, shapes[block], device)

        with torch.device("meta"):
            shapes = skeleton(row.shape, torch.device("meta"), blocks=self.count).model.layers
        residency = Residency(
            self.parts.modules,
            [[name for name, _ in block] for block in self.parts.blocks],
            form=FORMATS[placement.frozen],
            resident=placement.resident_blocks(self.count),
            copy_queue=open_copy_queue(device, timed=True),
            pin=lock,
        )
        if placement.frozen != "bf16":
            residency.exact_weights = Generated(make)
        for block in range(self.count):
            residency.store_block(block, make(block))
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
        for name, state in ours.optimizer.states.items():
            _watch(state, seen.setdefault(name, []))
        loss = torch.tensor(ours.advance())
        found.append({"loss": loss, "gradients": {name: [g.cpu() for g in gs] for name, gs in seen.items()}})
    return found


def _watch(state: ParameterState, into: list[Tensor]) -> None:
    """Keep every gradient that the state is given, as a whole or by its factors."""
    accumulate, accumulate_factored = state.accumulate, state.accumulate_factored

    def take(gradient: Tensor, **settings: Any) -> None:
        into.append(gradient.clone())
        accumulate(gradient, **settings)

    def take_product(left: Tensor, other: Tensor) -> Tensor | None:
        whole: Tensor | None = accumulate_factored(left, other)
        if whole is None:
            into.append(left.T @ other)
        return whole

    state.accumulate, state.accumulate_factored = take, take_product  # type: ignore[method-assign]

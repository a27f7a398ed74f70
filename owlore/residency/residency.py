"""Blocks that are visited: leased from the store while they are read, owned while they are trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from owlore.patches import PatchStack
from owlore.residency.binding import Binding
from owlore.residency.copy_queue import CopyQueue
from owlore.residency.device_buffers import DeviceBuffers
from owlore.residency.exact_weights import Exact, ExactWeights
from owlore.residency.store import Store
from owlore.residency.visits import next_loads


class StoreExactWeights:
    """Exact weights of an exact store: the blobs are the weights."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self, block: int) -> Exact:
        return {name: fields["weight"] for name, fields in self._store.views(block).items()}

    def keep(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Nothing more than filling the store, which happens for every block that leaves."""

    def expect(self, blocks: Iterable[int]) -> None:
        """The weights are in memory."""


class Residency:
    """The blocks of one model. names: for each block what the model calls its parameters, in the module's order.

    Every block has to be given its weights with `occupy` before anything is visited.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        names: Sequence[Sequence[str]],
        *,
        store: Store,
        exact_weights: ExactWeights,
        copies: CopyQueue,
        num_buffers: int = 2,
        patches: PatchStack | None = None,
    ) -> None:
        self.store, self.exact_weights, self.copies = store, exact_weights, copies
        streamed = [store.layouts[block].num_bytes for block in store.streamed]
        self.device_buffers = DeviceBuffers(copies, min(num_buffers, len(streamed)), max(streamed, default=0))
        patches = PatchStack() if patches is None else patches
        self.bindings = [
            Binding(block, module, names[block], store.layouts[block], copies.device, patches)
            for block, module in enumerate(modules)
        ]
        kinds = {layout: index for index, layout in enumerate(dict.fromkeys(store.layouts))}
        self._kind = [kinds[layout] for layout in store.layouts]
        self._slot_views: dict[tuple[int, int], dict[str, dict[str, Tensor]]] = {}
        self._resident_views: dict[int, dict[str, dict[str, Tensor]]] = {}
        self._home = {name: block for block, binding in enumerate(self.bindings) for name in binding.local}
        self._coming: list[int] = []
        self.live: set[int] = set()
        self.exact_visits = False
        self.keeps_dense = False  # a visit serves several micro-batches: what is lossy is made dense once

    def occupy(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Put a block's first exact weights (by name inside the block) into the store and free the module's own."""
        self.store.fill(block, tensors)
        self.bindings[block].unbind()

    def __len__(self) -> int:
        return len(self.bindings)

    # -- visits ------------------------------------------------------------------------------------------------------

    def walk(self, blocks: Iterable[int]) -> None:
        """The blocks that will be visited, in order; the loader looks ahead in it."""
        streamed = self.store.streamed - self.live
        self._coming = [block for block in blocks if block in streamed]

    @contextmanager
    def visit(self, block: int) -> Iterator[None]:
        """The block's weights are on the device inside: its own while it is drawn, else under a lease."""
        with self._held(block), self.copies.span("visit", block):
            yield

    @contextmanager
    def _held(self, block: int) -> Iterator[None]:
        if block in self.live:
            yield
        elif self.exact_visits:
            with self._owned(block):
                yield
        elif block in self.store.resident:
            with self._bound(block, self._views_of_resident(block)):
                yield
        else:
            self._load_ahead(block)
            slot, buffer = self.device_buffers.lease(block)
            try:
                with self._bound(block, self._views(slot, block, buffer)):
                    yield
            finally:
                self.device_buffers.release(slot)
                if self._coming and self._coming[0] == block:
                    del self._coming[0]

    def _load_ahead(self, block: int) -> None:
        if not self._coming or self._coming[0] != block:  # a call that was not planned: a forward of the whole model
            self.walk([*range(block, len(self)), *range(block)])
        for slot, wanted in next_loads(self.device_buffers.owner, self._coming):
            self.device_buffers.load(slot, wanted, self.store.blobs[wanted])

    def _views(self, slot: int, block: int, buffer: Tensor) -> dict[str, dict[str, Tensor]]:
        key = (slot, self._kind[block])
        if key not in self._slot_views:
            self._slot_views[key] = self.store.layouts[block].views(buffer)
        return self._slot_views[key]

    def _views_of_resident(self, block: int) -> dict[str, dict[str, Tensor]]:
        if block not in self._resident_views:
            self._resident_views[block] = self.store.views(block)
        return self._resident_views[block]

    @contextmanager
    def _bound(self, block: int, views: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
        self.bindings[block].bind(views, keeps=self.keeps_dense)
        try:
            yield
        finally:
            self.bindings[block].unbind()

    @contextmanager
    def _owned(self, block: int) -> Iterator[None]:
        self.bindings[block].take(self.exact_weights.read(block), self.copies.device)
        try:
            yield
        finally:
            self.bindings[block].unbind()

    # -- the drawn set -----------------------------------------------------------------------------------------------

    def set_active(self, drawn: Collection[int]) -> None:
        """Let exactly the drawn blocks own their weights; what the others learned goes back to masters and store."""
        for block in sorted(self.live - set(drawn)):
            self._leave(block)
        for block in sorted(set(drawn) - self.live):
            self._draw(block)

    def _draw(self, block: int) -> None:
        if self._trains_in_place(block):
            self.bindings[block].adopt(self._views_of_resident(block))
        else:
            self.bindings[block].take(self.exact_weights.read(block), self.copies.device)
            self.device_buffers.forget(block)
            if block in self.store.resident:  # its lossy form would only take room
                self._resident_views.pop(block, None)
                self.store.drop(block)
        self.live.add(block)

    def _leave(self, block: int) -> None:
        if not self._trains_in_place(block):
            self._keep(block, self.bindings[block].values())
        self.bindings[block].unbind()
        self.live.discard(block)

    def _trains_in_place(self, block: int) -> bool:
        """Exact and on the device: the store's bytes are the weights that are trained."""
        return block in self.store.resident and self.store.layouts[block].exact

    def _keep(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        self.exact_weights.keep(block, tensors)
        self.store.fill(block, tensors)
        self.device_buffers.forget(block)

    # -- exact weights -----------------------------------------------------------------------------------------------

    def exact(self, name: str) -> Tensor:
        """A parameter's true value: its own memory while drawn, else its master."""
        return self.values([name])[name]

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """True values of parameters by name; each block is read once."""
        found: dict[str, Tensor] = {}
        for block, members in self._by_block(names).items():
            binding = self.bindings[block]
            exact = binding.values() if block in self.live else self.exact_weights.read(block)
            found |= {name: exact[binding.local[name]] for name in members}
        return found

    def _by_block(self, names: Iterable[str]) -> dict[int, list[str]]:
        blocks: dict[int, list[str]] = {}
        for name in names:
            blocks.setdefault(self._home[name], []).append(name)
        return blocks

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters to these values, wherever they live."""
        for block, members in self._by_block(weights).items():
            given = {self.bindings[block].local[name]: weights[name] for name in members}
            if block in self.live:
                for local, tensor in given.items():
                    self.bindings[block].parameters[local].data.copy_(tensor)
            else:
                whole = {local: tensor.clone() for local, tensor in self.exact_weights.read(block).items()}
                self._keep(block, whole | given)

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Inside, every visit reads the exact weights, not those of a lossy format."""
        self.exact_visits = not self.store.exact
        try:
            yield
        finally:
            self.exact_visits = False

    # -- what is held ------------------------------------------------------------------------------------------------

    def device_bytes(self) -> dict[str, int]:
        """Bytes of block weights on the device, by kind."""
        return {
            "slots": self.device_buffers.num_bytes,
            "resident": self.store.device_bytes(),
            "drawn": sum(binding.num_bytes() for binding in self.bindings),
        }

    def restore(self) -> None:
        """Give every block its exact weights for good, where they lie; its forwards have to be its own again."""
        for block, binding in enumerate(self.bindings):
            exact = binding.values() if block in self.live else self.exact_weights.read(block)
            for name, parameter in binding.parameters.items():
                parameter.data = exact[name]

"""The blocks of a streamed model: leased while they are visited, with memory of their own while they are trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from owlore.patches import PatchStack
from owlore.residency.binding import Binding, layout_of
from owlore.residency.blob_layout import Views
from owlore.residency.copy_queue import CopyQueue
from owlore.residency.device_buffers import DeviceBuffers
from owlore.residency.exact_weights import ExactWeights, Tensors
from owlore.residency.formats import Format
from owlore.residency.pinned import Pin
from owlore.residency.store import Store
from owlore.residency.visits import next_loads


class Residency:
    """The blocks of one model. Each has to be given its weights with `store_block` before the first visit.

    Args:
        modules: the blocks.
        names: for each block the model's names of its parameters, in the module's order.
        form: format of frozen matrices.
        resident: blocks that stay on the device while they are frozen.
        copy_queue: the queue of the device.
        pin: allocates host memory.
        num_buffers: device buffers that streamed blocks share.
        patches: the stack on which the forwards of linear maps are replaced.

    Attributes:
        exact_weights: has the exact weights where the format is lossy; None where the store is exact.
        active: blocks that are trained.
        cache_dense: whether a visit makes a quantised matrix dense only once, for several micro-batches.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        names: Sequence[Sequence[str]],
        *,
        form: Format,
        resident: Collection[int],
        copy_queue: CopyQueue,
        pin: Pin,
        num_buffers: int = 2,
        patches: PatchStack | None = None,
    ) -> None:
        device, layouts = copy_queue.device, [layout_of(module, form) for module in modules]
        self.store = store = Store(layouts, device=device, resident=resident, pin=pin)
        self.copy_queue = copy_queue
        self.exact_weights: ExactWeights | None = None
        streamed = [layouts[block].num_bytes for block in store.streamed]
        self.device_buffers = DeviceBuffers(copy_queue, min(num_buffers, len(streamed)), max(streamed, default=0))
        patches = PatchStack() if patches is None else patches
        self.bindings = [
            Binding(block, module, names[block], layouts[block], device, patches)
            for block, module in enumerate(modules)
        ]
        kinds = {layout: index for index, layout in enumerate(dict.fromkeys(layouts))}
        self._kinds = [kinds[layout] for layout in layouts]
        self._buffer_views: dict[tuple[int, int], Views] = {}  # by buffer and kind of block
        self._resident_views: dict[int, Views] = {}
        self._block_of = {name: block for block, binding in enumerate(self.bindings) for name in binding.local_names}
        self._upcoming: list[int] = []
        self.active: set[int] = set()
        self._visits_exact = False
        self.cache_dense = False

    def store_block(self, block: int, tensors: Tensors) -> None:
        """Put a block's first exact weights (by name inside the block) into the store and free the module's own."""
        self.store.fill(block, tensors)
        self.bindings[block].unbind()

    # -- visits ------------------------------------------------------------------------------------------------------

    def plan_visits(self, blocks: Iterable[int]) -> None:
        """Set the blocks that will be visited, in order; loads are queued ahead of them."""
        streamed = self.store.streamed - self.active
        self._upcoming = [block for block in blocks if block in streamed]

    @contextmanager
    def visit(self, block: int) -> Iterator[None]:
        """Inside, the block's weights are on the device: its own while it is trained, else under a lease."""
        with self._bound(block), self.copy_queue.span("visit", block):
            yield

    @contextmanager
    def _bound(self, block: int) -> Iterator[None]:
        if block in self.active:
            yield
            return
        binding, leased = self.bindings[block], None
        try:
            if self._visits_exact:
                binding.copy_from(self._read_exact(block), self.copy_queue.device)
            elif block in self.store.resident:
                binding.bind(self._views_of_resident(block), cache_dense=self.cache_dense)
            else:
                self._load_ahead(block)
                leased, buffer = self.device_buffers.lease(block)
                binding.bind(self._views_of_buffer(leased, block, buffer), cache_dense=self.cache_dense)
            yield
        finally:
            binding.unbind()
            if leased is not None:
                self.device_buffers.release(leased)
                if self._upcoming and self._upcoming[0] == block:
                    del self._upcoming[0]

    def _load_ahead(self, block: int) -> None:
        if not self._upcoming or self._upcoming[0] != block:  # an unplanned call: a forward of the whole model
            self.plan_visits([*range(block, len(self.bindings)), *range(block)])
        for index, wanted in next_loads(self.device_buffers.blocks, self._upcoming):
            self.device_buffers.load(index, wanted, self.store.blobs[wanted])

    def _views_of_buffer(self, index: int, block: int, buffer: Tensor) -> Views:
        key = (index, self._kinds[block])
        if key not in self._buffer_views:
            self._buffer_views[key] = self.store.layouts[block].views(buffer)
        return self._buffer_views[key]

    def _views_of_resident(self, block: int) -> Views:
        if block not in self._resident_views:
            self._resident_views[block] = self.store.views(block)
        return self._resident_views[block]

    @contextmanager
    def visit_exact_weights(self) -> Iterator[None]:
        """Inside, every visit reads the exact weights, not those of a lossy format."""
        self._visits_exact = not self.store.exact
        try:
            yield
        finally:
            self._visits_exact = False

    # -- the active blocks -------------------------------------------------------------------------------------------

    def set_active(self, blocks: Collection[int]) -> None:
        """Train exactly these blocks; the trained values of the others are written back."""
        for block in sorted(self.active - set(blocks)):
            self._deactivate(block)
        for block in sorted(set(blocks) - self.active):
            self._activate(block)

    def _activate(self, block: int) -> None:
        if self._trains_in_store(block):
            self.bindings[block].bind_exact(self._views_of_resident(block))
        else:
            self.bindings[block].copy_from(self._read_exact(block), self.copy_queue.device)
            self.device_buffers.invalidate(block)
            if block in self.store.resident:  # its lossy form is not read while it is trained
                self._resident_views.pop(block, None)
                self.store.drop(block)
        self.active.add(block)

    def _deactivate(self, block: int) -> None:
        if not self._trains_in_store(block):
            self._write_back(block, self.bindings[block].values())
        self.bindings[block].unbind()
        self.active.discard(block)

    def _trains_in_store(self, block: int) -> bool:
        """Whether the block's blob is exact and on the device, so that its bytes are what is trained."""
        return block in self.store.resident and self.store.layouts[block].exact

    # -- exact weights -----------------------------------------------------------------------------------------------

    def _read_exact(self, block: int) -> Tensors:
        """Exact weights of a block that is not active; those of an exact store are views of the blob."""
        if self.exact_weights is not None:
            return self.exact_weights.read(block)
        return {name: fields["weight"] for name, fields in self.store.views(block).items()}

    def _write_back(self, block: int, tensors: Tensors) -> None:
        if self.exact_weights is not None:
            self.exact_weights.write(block, tensors)
        self.store.fill(block, tensors)
        self.device_buffers.invalidate(block)

    def _present(self, block: int) -> Tensors:
        return self.bindings[block].values() if block in self.active else self._read_exact(block)

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Begin to read the exact weights of blocks that become active next, where they come from a file."""
        if self.exact_weights is not None:
            self.exact_weights.prefetch(set(blocks) - self.active)

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Exact values of parameters by the model's names; each block is read once."""
        found: dict[str, Tensor] = {}
        for block, members in self._by_block(names).items():
            exact, local_names = self._present(block), self.bindings[block].local_names
            found |= {name: exact[local_names[name]] for name in members}
        return found

    def _by_block(self, names: Iterable[str]) -> dict[int, list[str]]:
        blocks: dict[int, list[str]] = {}
        for name in names:
            blocks.setdefault(self._block_of[name], []).append(name)
        return blocks

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters, by the model's names, to these values."""
        for block, members in self._by_block(weights).items():
            given = {self.bindings[block].local_names[name]: weights[name] for name in members}
            if block in self.active:
                for local, tensor in given.items():
                    self.bindings[block].parameters[local].data.copy_(tensor)
            else:
                before = {local: tensor.clone() for local, tensor in self._read_exact(block).items()}
                self._write_back(block, before | given)

    def device_bytes(self) -> dict[str, int]:
        """Bytes of block weights on the device: in buffers (`slots`), of resident and of drawn blocks."""
        return {
            "slots": self.device_buffers.num_bytes,
            "resident": self.store.device_bytes(),
            "drawn": sum(binding.num_bytes() for binding in self.bindings),
        }

    def restore(self) -> None:
        """Give every block its exact weights for good; the replaced forwards have to be taken off before."""
        for block, binding in enumerate(self.bindings):
            exact = self._present(block)
            for name, parameter in binding.parameters.items():
                parameter.data = exact[name]

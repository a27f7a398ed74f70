"""A linear layer with trained deltas (fp32) on chosen blocks, which are written into the weight or added to the output.

In place, the weight holds cast(W0 + D) on the chosen blocks, so that forward and input gradient are those of a dense
layer, without extra work. W0's blocks are kept, so that disabling or unmerging restores every bit. The blocks are
rewritten when the version counter of a delta changes. Optimizers and checkpoints may write through `.data` or raw
pointers, which the counter does not see; so a forward that records a graph always rewrites the blocks (k * l^2
values), and so does the first forward after it. `refresh` does it at once.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from owlore.adapters.base import AdaptedLinear
from owlore.adapters.targets import device_and_dtype, is_plain, matrix_of, shape_of
from owlore.kernels.block_sparse import (
    BlockIndex,
    Cell,
    block_product,
    make_layout,
    read_blocks,
    write_blocks,
    written_linear,
)


class BlockDeltas(nn.Module):
    """The deltas of one adapter in one matrix.

    Args:
        base: The layer that is adapted.
        block: Side of a full block.
        cells: (i, j) of each block.

    Attributes:
        delta: The values, flat, at least fp32.
        index: (i, j) of each block in the order of the values, (k, 2) int32.
        original: The blocks of W0 while the adapter's are in the weight, else None.
    """

    index: Tensor
    original: Tensor | None

    def __init__(self, base: nn.Module, block: int, cells: list[Cell]) -> None:
        super().__init__()
        self.shape, self.block = shape_of(base), block
        layout = make_layout(self.shape, block, cells)
        device, dtype = device_and_dtype(base)
        self.delta = nn.Parameter(torch.zeros(layout.size, dtype=dtype, device=device))
        self.register_buffer("index", torch.tensor(layout.cells, dtype=torch.int32, device=device))
        self.register_buffer("original", None, persistent=False)
        self._layout: BlockIndex | None = None

    def layout(self) -> BlockIndex:
        """The index of the blocks, on the delta's device.

        Raises:
            ValueError: The index of an adapter file does not fit the deltas.
        """
        if self._layout is None:
            self._layout = make_layout(self.shape, self.block, self.index.tolist(), self.delta.device)
            if self._layout.size != self.delta.numel():
                raise ValueError(
                    f"got {self.delta.numel()} values for blocks of {self._layout.size} entries, expected as many: "
                    "the adapter's file and its block_map disagree"
                )
        return self._layout

    def _apply(self, fn: Any, recurse: bool = True) -> BlockDeltas:
        self._layout = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._layout = None


class SmtLayer(AdaptedLinear):
    """A linear layer with the chosen blocks of one or several adapters.

    Note: where active adapters share entries, their deltas add up; with a 16-bit weight each addition is rounded.

    Args:
        base_layer: The layer (nn.Linear, Conv1D or quantised), or another adapter's layer around it.
        mode: One of `owlore.adapters.smt_config.MODES`.

    Raises:
        ValueError: The mode is "inplace" and the weight is not a plain float tensor.
    """

    adapter_layer_names = ("smt_blocks",)

    def __init__(self, base_layer: nn.Module, mode: str) -> None:
        super().__init__(base_layer)
        base = self.get_base_layer()
        if mode == "inplace" and not is_plain(base):
            raise ValueError(f'mode="inplace" and a {type(base).__name__}: only plain float weights can be written')
        self.in_place = mode == "inplace" or (mode == "auto" and is_plain(base))
        self.smt_blocks = nn.ModuleDict()
        self._written: list[str] = []  # adapters whose blocks are in the weight
        self._token: tuple[Any, ...] = ()  # identifies the values in the weight
        self._stale = True  # a delta may have changed without a trace since the last forward

    def update_layer(self, adapter_name: str, block: int, cells: list[Cell], inference_mode: bool = False) -> None:
        """Add an adapter with zero deltas on these blocks."""
        self.smt_blocks[adapter_name] = BlockDeltas(self.get_base_layer(), block, cells)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    # -- the weight's blocks -----------------------------------------------------------------------------------------

    @torch.compiler.disable
    def refresh(self, *, force: bool = False) -> None:
        """Write the deltas into the weight if they changed, with `force` also if no version counter changed."""
        wanted = self._wanted()
        token = self._describe(wanted)
        if token == self._token and not (force or self._stale):
            return
        if any(self._deltas(name).delta.is_meta for name in wanted):
            return  # PEFT is still loading
        self._write(wanted)
        self._token = token

    def _wanted(self) -> list[str]:
        """The adapters whose blocks should be in the weight now."""
        if self.merged:
            return self._present(self.merged_adapters)
        return [] if self.disable_adapters or not self.in_place else self._present(self.active_adapters)

    def _describe(self, names: list[str]) -> tuple[Any, ...]:
        """A token that is equal exactly for the same values of the same deltas in the same memory."""
        deltas = [(name, self._deltas(name).delta) for name in names]
        where = matrix_of(self.get_base_layer()).data_ptr() if names else 0
        return (where, *((name, id(delta), delta._version) for name, delta in deltas))

    @torch.no_grad()
    def _write(self, names: list[str]) -> None:
        if not names and not self._written:
            return
        matrix = matrix_of(self.get_base_layer())
        if names != self._written or len(names) > 1:  # else the only adapter's blocks are overwritten anyway
            self._restore(matrix)
        for name in names:
            deltas = self._deltas(name)
            if deltas.original is None:
                deltas.original = read_blocks(matrix, deltas.layout())
        for number, name in enumerate(names):
            deltas = self._deltas(name)
            layout = deltas.layout()
            start = deltas.original if number == 0 else read_blocks(matrix, layout)
            assert start is not None
            write_blocks(matrix, layout, start.to(deltas.delta.dtype) + deltas.delta)
        self._written = names

    def _restore(self, matrix: Tensor) -> None:
        """Write W0's blocks back, bit for bit."""
        for name in self._written:
            deltas = self._deltas(name)
            if deltas.original is not None:
                write_blocks(matrix, deltas.layout(), deltas.original)
            deltas.original = None
        self._written, self._token = [], ()

    @torch.no_grad()
    def restore(self) -> None:
        """Take the adapters' blocks out of the weight; the next forward writes them again."""
        if self._written:
            self._restore(matrix_of(self.get_base_layer()))

    def _deltas(self, name: str) -> BlockDeltas:
        found = self.smt_blocks[name]
        assert isinstance(found, BlockDeltas)
        return found

    # -- PEFT's interface --------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self._present(self.active_adapters)
        deltas = [self._deltas(name) for name in names]
        trained = torch.is_grad_enabled() and any(d.delta.requires_grad for d in deltas)
        self.refresh(force=trained)
        self._stale = trained
        if not deltas or (self.in_place and not trained):
            return self.base_layer(x, *args, **kwargs)
        if not self.in_place:
            y = self.base_layer(x, *args, **kwargs)
            for d in deltas:
                y = y + block_product(x, d.layout(), d.delta).to(y.dtype)
            return y
        base = self.get_base_layer()
        return written_linear(
            x,
            lambda inputs: self.base_layer(inputs, *args, **kwargs),
            matrix_of(base),
            getattr(base, "bias", None),
            lambda: self._token,
            [d.layout() for d in deltas],
            [d.delta for d in deltas],
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the adapters' blocks in the base weight until `unmerge`.

        Args:
            safe_merge: Whether to refuse a delta that is not finite.
            adapter_names: The adapters to merge; None takes the active ones.

        Raises:
            ValueError: The base is quantised, or a delta is not finite.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if not is_plain(self.get_base_layer()):
            raise ValueError("got a quantised base, expected float weights: load the adapter on the unquantised model")
        for name in names if safe_merge else ():
            if not torch.isfinite(self._deltas(name).delta).all():
                raise ValueError(f"NaN or infinity in the deltas of adapter {name}")
        self.merged_adapters.extend(names)
        self.refresh(force=True)

    def unmerge(self) -> None:
        """Restore the base weight, bit for bit."""
        self.merged_adapters.clear()
        self.restore()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """D as a dense matrix (outputs x inputs), in the deltas' dtype."""
        deltas = self._deltas(adapter)
        dense = torch.zeros(deltas.shape, dtype=deltas.delta.dtype, device=deltas.delta.device)
        write_blocks(dense, deltas.layout(), deltas.delta.detach())
        return dense

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.refresh()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        self.restore()
        super().delete_adapter(adapter_name)
        self.refresh()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the blocks written into it if `merge`."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.restore()
        return self.get_base_layer()

    def _apply(self, fn: Any, recurse: bool = True) -> SmtLayer:
        self._stale = True
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        return "smt." + super().__repr__()

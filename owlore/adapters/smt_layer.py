"""A linear map some of whose blocks are trained: fp32 deltas, written into the weight or beside it.

In place, the weight holds cast(W0 + D) on the chosen blocks, so forward and input gradient are the dense layer's own
and cost nothing extra. W0's blocks are kept, so that disabling or unmerging brings every bit back. The blocks are
rewritten when a delta changed: its version counter tells. Optimizers and checkpoints may write through `.data` or raw
pointers, which no counter sees; so a forward that records a graph always rewrites (k * l^2 values), and so does the
first one after it. `refresh` does it at once.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from owlore.adapters.targets import is_plain, matrix_of, place_of, shape_of
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
    """The values of one adapter in one matrix (flat, at least fp32) and where they lie (int32, an (i, j) a block)."""

    index: Tensor
    original: Tensor | None

    def __init__(self, base: nn.Module, block: int, cells: list[Cell]) -> None:
        super().__init__()
        self.shape, self.block = shape_of(base), block
        layout = make_layout(self.shape, block, cells)
        device, dtype = place_of(base)
        self.delta = nn.Parameter(torch.zeros(layout.size, dtype=dtype, device=device))
        self.register_buffer("index", torch.tensor(layout.cells, dtype=torch.int32, device=device))
        self.register_buffer("original", None, persistent=False)  # W0's blocks while ours are in the weight
        self._layout: BlockIndex | None = None

    def layout(self) -> BlockIndex:
        """Where the blocks lie, on the delta's device.

        Raises: ValueError when an adapter file brought an index that does not fit the deltas.
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


class SmtLayer(nn.Module, BaseTunerLayer):
    """Any linear map (nn.Linear, Conv1D, quantised) with the chosen blocks of one or several adapters.

    Where active adapters share entries, their deltas add up; with a 16-bit weight each addition is rounded.
    """

    adapter_layer_names = ("smt_blocks",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, mode: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        if mode == "inplace" and not is_plain(base):
            raise ValueError(f'mode="inplace" and a {type(base).__name__}: only plain float weights can be written')
        self.out_features, self.in_features = shape_of(base)
        self.in_place = mode == "inplace" or (mode == "auto" and is_plain(base))
        self.smt_blocks = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._written: tuple[str, ...] = ()  # adapters whose blocks are in the weight
        self._token: tuple[Any, ...] = ()  # what exactly is in the weight
        self._stale = True  # a delta may have changed unseen since the last forward

    def update_layer(self, adapter_name: str, block: int, cells: list[Cell], inference_mode: bool = False) -> None:
        """Add an adapter with zero deltas on these blocks."""
        self.smt_blocks[adapter_name] = BlockDeltas(self.get_base_layer(), block, cells)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    # -- the weight's blocks -----------------------------------------------------------------------------------------

    @torch.compiler.disable
    def refresh(self, *, force: bool = False) -> None:
        """Bring the weight's blocks up to date; `force` when a delta may have changed without a trace."""
        wanted = self._wanted()
        token = self._describe(wanted)
        if token == self._token and not (force or self._stale):
            return
        if any(self._deltas(name).delta.is_meta for name in wanted):
            return  # PEFT is still loading
        self._write(wanted)
        self._token = token

    def _wanted(self) -> tuple[str, ...]:
        """Adapters that belong into the weight now."""
        if self.merged:
            names: list[str] = self.merged_adapters
        elif self.disable_adapters or not self.in_place:
            names = []
        else:
            names = self.active_adapters
        return tuple(name for name in names if name in self.smt_blocks)

    def _describe(self, names: tuple[str, ...]) -> tuple[Any, ...]:
        """Equal exactly when the same values of the same deltas are meant, in the same memory."""
        deltas = [(name, self._deltas(name).delta) for name in names]
        where = matrix_of(self.get_base_layer()).data_ptr() if names else 0
        return (where, *((name, id(delta), delta._version) for name, delta in deltas))

    @torch.no_grad()
    def _write(self, names: tuple[str, ...]) -> None:
        if not names and not self._written:
            return
        matrix = matrix_of(self.get_base_layer())
        if names != self._written or len(names) > 1:  # else every block of ours is overwritten anyway
            self._restore(matrix)
        for name in names:
            deltas = self._deltas(name)
            layout = deltas.layout()
            if deltas.original is None:
                deltas.original = read_blocks(matrix, layout)
        for place, name in enumerate(names):
            deltas = self._deltas(name)
            layout = deltas.layout()
            start = deltas.original if place == 0 else read_blocks(matrix, layout)
            assert start is not None
            write_blocks(matrix, layout, start.to(deltas.delta.dtype) + deltas.delta)
        self._written = names

    def _restore(self, matrix: Tensor) -> None:
        """W0 again, bit for bit."""
        for name in self._written:
            deltas = self._deltas(name)
            if deltas.original is not None:
                write_blocks(matrix, deltas.layout(), deltas.original)
            deltas.original = None
        self._written, self._token = (), ()

    @torch.no_grad()
    def restore(self) -> None:
        """Take our blocks out of the weight; the next forward writes them again."""
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
        names = () if self.disable_adapters or self.merged else self._active()
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

    def _active(self) -> tuple[str, ...]:
        return tuple(name for name in self.active_adapters if name in self.smt_blocks)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters' blocks into the base weight for good (until `unmerge`).

        Raises: ValueError for a quantised base, or with `safe_merge` when a delta is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.smt_blocks]
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
        self.merged_adapters.clear()
        self.restore()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """D as a dense matrix (outputs x inputs), fp32."""
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
        """The base layer with the blocks written, or as it was."""
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

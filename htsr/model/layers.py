"""The matrices of a model: a view of every tensor, of the experts in a stack and of the parts of a fused projection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from htsr.model.fused import expert_gate_up, gate_up_parts, model_type, qkv_parts
from htsr.model.names import (
    count_blocks,
    distinct_roles,
    expert_role,
    locate_blocks,
    plain_gguf_roles,
    role_of,
    stored_transposed,
)
from htsr.model.parts import Part, Runs, flat_shape, kernel_parts, run
from htsr.model.reasons import too_small, why_not

if TYPE_CHECKING:
    from htsr.model.source import Source, TensorInfo


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """A matrix of a model.

    Attributes:
        tensor: the name in the file; a matrix inside a tensor has its part in brackets, as in `experts.up[3]`.
        block: number of the block it is in, from 0; None outside the blocks.
        role: what it does in its block, such as `q` or `down`.
        rows: number of rows of the tensor seen as a matrix.
        cols: number of columns.
        dtype: the stored dtype.
        reason: why its spectrum cannot be computed; empty when it can.
        transposed: whether it is stored as (inputs, outputs), as Conv1D does.
        part: where the matrix lies inside its tensor; None when it is all of it.
        part_of: `tensor` of the fused matrix that contains it, else empty.
        pool: for a convolution, the matrices whose eigenvalues are pooled.
    """

    tensor: str
    block: int | None
    role: str
    rows: int
    cols: int
    dtype: str
    reason: str
    transposed: bool = False
    part: Part | None = None
    part_of: str = ""
    pool: tuple[Part, ...] = ()

    @property
    def stored(self) -> str:
        """The name of the tensor in the source."""
        return self.part.tensor if self.part is not None else self.tensor


def views(source: Source) -> list[LayerView]:
    """List the matrices of a model: embeddings first, then block after block, then what follows the blocks.

    A stack of experts has a view for each matrix of each expert. A fused q, k and v (or gate and up) has a view, and
    one for each of its parts where the configuration tells where they lie. Every other tensor has one view.

    Args:
        source: an open model.
    """
    locations = locate_blocks([t.name for t in source.tensors], numbered=source.numbered)
    tail_roles = distinct_roles([(t.name, *locations[t.name]) for t in source.tensors if len(t.shape) in (2, 4)])
    roles = {n: tail_roles.get(n, role_of(rest)) for n, (_, rest) in locations.items()}
    roles.update(plain_gguf_roles(source.tensors, roles))
    transposed = stored_transposed(source.tensors)
    stacks = {(locations[t.name][0], roles[t.name]): t.shape for t in source.tensors if len(t.shape) == 3}
    result: list[LayerView] = []
    for tensor in source.tensors:
        block, rest = locations[tensor.name]
        view = _view(tensor, block, roles[tensor.name], tensor.name in transposed)
        if view.reason:
            result.append(view)
        elif len(tensor.shape) == 3:
            result += _experts(view, rest, tensor.shape, stacks.get((block, "down")), source.config)
        elif len(tensor.shape) == 4:
            result.append(replace(view, pool=tuple(kernel_parts(tensor.name, tensor.shape))))
        else:
            result += [view, *_fused_parts(view, source.config)]
    return sorted(result, key=_order)


def num_blocks(source: Source) -> int:
    """How many blocks the tensors of a source make up."""
    return count_blocks([t.name for t in source.tensors], numbered=source.numbered)


def _view(tensor: TensorInfo, block: int | None, role: str, transposed: bool) -> LayerView:
    rows, cols = flat_shape(tensor.shape)
    leaf = tensor.name.rpartition(".")[2]
    return LayerView(
        tensor=tensor.name,
        block=block,
        role=role,
        rows=rows,
        cols=cols,
        dtype=tensor.dtype,
        reason=why_not(tensor, convolution="conv" in tensor.name, bias=leaf.endswith("bias")),
        transposed=transposed,
    )


def _experts(
    view: LayerView, rest: str, shape: tuple[int, ...], down: tuple[int, ...] | None, config: Mapping[str, Any] | None
) -> Iterator[LayerView]:
    """The matrices of a stack (experts, rows, cols): one an expert, or gate and up of each where they are fused."""
    _, height, width = shape
    base = role_of(rest)
    shares = expert_gate_up(shape, down, model_type(config)) if base.endswith("gate_up") else {}
    for index in range(shape[0]):
        role = expert_role(rest, index)
        for share, (rows, cols) in (shares or {"": (run(0, height), run(0, width))}).items():
            rows = replace(rows, start=rows.start + index * height)
            name = f"{view.tensor}[{index}]" + (f"[{share}]" if share else "")
            yield _part_view(view, name, role.removesuffix("gate_up") + share if share else role, rows, cols)


def _fused_parts(view: LayerView, config: Mapping[str, Any] | None) -> Iterator[LayerView]:
    """q, k and v, or gate and up, of a fused matrix; nothing for any other and where they lie uncertainly."""
    axis = 1 if view.transposed else 0
    outputs, inputs = (view.rows, view.cols) if axis == 0 else (view.cols, view.rows)
    if view.role.endswith("qkv"):
        thirds = view.tensor.endswith("in_proj_weight") and outputs == 3 * inputs  # nn.MultiheadAttention
        heads = {"model_type": "mpt", "num_attention_heads": 1, "hidden_size": inputs} if thirds else config
        along = qkv_parts(outputs, heads, concatenated="attn_qkv" in view.tensor)
        across = run(0, inputs)
        shares = {n: (chosen, across) if axis == 0 else (across, chosen) for n, chosen in along.items()}
        stem = view.role.removesuffix("qkv")
    elif view.role.endswith("gate_up"):
        shares = gate_up_parts(view.rows, view.cols, axis, interleaved=False)
        stem = view.role.removesuffix("gate_up")
    else:
        return
    for share, (rows, cols) in shares.items():
        yield replace(_part_view(view, f"{view.tensor}[{share}]", stem + share, rows, cols), part_of=view.tensor)


def _part_view(view: LayerView, tensor: str, role: str, rows: Runs, cols: Runs) -> LayerView:
    """The view of chosen rows and columns of a tensor, with their name and role."""
    part, reason = Part(tensor=view.tensor, rows=rows, cols=cols), too_small(min(rows.size, cols.size))
    return replace(view, tensor=tensor, role=role, rows=rows.size, cols=cols.size, part=part, reason=reason)


def _order(view: LayerView) -> tuple[Any, ...]:
    group = 1 if view.block is not None else (0 if "embeddings" in view.role else 2)
    return group, view.block or 0, view.stored

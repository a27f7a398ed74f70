"""Matrices inside a tensor: an expert of a stack, a share of a fused projection, a slice of a convolution's kernel.

A tensor of any number of dimensions is seen as one matrix (`flat_shape`), and a part is a regular choice of its rows
and of its columns. So a part is read from the file a block at a time, like a matrix of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.numerics.spectrum import Block

if TYPE_CHECKING:
    from htsr.model.layers import LayerView
    from htsr.model.source import Source, TensorInfo

MIN_SIDE = 8  # weightwatcher's own limit: fewer singular values make no spectrum
WINDOW_ELEMENTS = 1 << 21  # what is read at once where only some of the columns are wanted

CONCATENATED = ("phi3", "phi4_multimodal", "gpt2", "mpt", "modernbert", "dbrx", "decision_transformer")  # q | k | v
INPUTS_FIRST = {"gpt_oss": True, "llama4": False, "llama4_text": False}  # experts (in, out): whether interleaved
BY_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")  # q k v of head 0, q k v of head 1, ...


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Positions along a dimension: `count` runs of `width`, the first at `start`, one every `stride`."""

    start: int
    width: int
    stride: int
    count: int

    @property
    def size(self) -> int:
        return self.width * self.count

    def pieces(self, first: int, last: int) -> list[tuple[int, int]]:
        """The stretches of the dimension that hold chosen positions `first` to `last` (counted among the chosen)."""
        found = []
        while first < last:
            run, offset = divmod(first, self.width)
            length = min(self.width - offset, last - first)
            begin = self.start + run * self.stride + offset
            found.append((begin, begin + length))
            first += length
        return found

    def indices(self) -> np.ndarray:
        """All chosen positions, ascending."""
        first = self.start + self.stride * np.arange(self.count)
        return (first[:, None] + np.arange(self.width)).ravel()


def run(start: int, width: int) -> Runs:
    """One stretch."""
    return Runs(start=start, width=width, stride=width, count=1)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The chosen rows and columns of the stored tensor `tensor`, seen as a matrix."""

    tensor: str
    rows: Runs
    cols: Runs


def flat_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as a matrix: a stack's matrices one below the other, a kernel with a row an output channel."""
    if len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def read_block(source: Source, view: LayerView, block: Block) -> np.ndarray:
    """Rows or columns of the matrix that a view stands for."""
    if view.part is None:
        return source.array(view.tensor, block)
    return read_part(source, view.part, block)


def read_part(source: Source, part: Part, block: Block) -> np.ndarray:
    """Rows or columns (`block.axis` 0 or 1) of a part, a C-contiguous array."""
    rows = (block.start, block.stop) if block.axis == 0 else (0, part.rows.size)
    cols = (0, part.cols.size) if block.axis == 0 else (block.start, block.stop)
    strips = [_columns(source, part, stretch, cols) for stretch in part.rows.pieces(*rows)]
    return strips[0] if len(strips) == 1 else np.concatenate(strips)


def _columns(source: Source, part: Part, rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
    """Stored rows of a part, its chosen columns `cols`: read with what lies between them, a few rows at a time."""
    stretches = part.cols.pieces(*cols)
    low, high = stretches[0][0], stretches[-1][1]
    if len(stretches) == 1:
        return source.window(part.tensor, rows, (low, high))
    wanted = np.concatenate([np.arange(begin, end) for begin, end in stretches]) - low
    step = max(WINDOW_ELEMENTS // (high - low), 1)
    windows = [(r, min(r + step, rows[1])) for r in range(rows[0], rows[1], step)]
    return np.concatenate([source.window(part.tensor, window, (low, high))[:, wanted] for window in windows])


def thin_factors(source: Source, view: LayerView) -> tuple[np.ndarray, np.ndarray] | None:
    """B (rows, r) and A (r, cols) of a view whose tensor is their product, None where it is not."""
    found = source.factors(view.stored)
    if found is None or view.part is None:
        return found
    B, A = found
    return B[view.part.rows.indices()], A[:, view.part.cols.indices()]


def qkv_parts(outputs: int, config: Mapping[str, Any] | None, *, concatenated: bool) -> dict[str, Runs]:
    """Where q, k and v lie among the outputs of a fused projection; empty unless the configuration makes it certain.

    concatenated: the file format itself puts q, k and v one after the other, whatever the model did.
    """
    text = dict(config or {})
    text = {**text, **text.get("text_config", {})} if isinstance(text.get("text_config"), dict) else text
    kind = str(text.get("model_type"))
    heads, size = _heads(text)
    if not heads or not size:
        return {}
    groups = _groups(text, kind, heads)
    if outputs != (heads + 2 * groups) * size:
        return {}
    falcon_groups = kind == "falcon" and bool(text.get("new_decoder_architecture"))
    shared = bool(text.get("multi_query")) and kind in ("falcon", "gpt_bigcode") and not falcon_groups
    if concatenated or kind in CONCATENATED or shared:
        q, kv = heads * size, groups * size
        return {"q": run(0, q), "k": run(q, kv), "v": run(q + kv, kv)}
    if kind in BY_HEAD or kind in ("falcon", "gpt_bigcode"):
        queries, every = heads // groups * size, (heads // groups + 2) * size
        widths = {"q": (0, queries), "k": (queries, size), "v": (queries + size, size)}
        return {name: Runs(start=s, width=w, stride=every, count=groups) for name, (s, w) in widths.items()}
    return {}


def _heads(text: Mapping[str, Any]) -> tuple[int, int]:
    """The number of heads and their size, 0 where the configuration does not say."""
    heads = _number(text, "num_attention_heads", "n_head", "n_heads")
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    return heads, _number(text, "head_dim") or (hidden // heads if heads else 0)


def _groups(text: Mapping[str, Any], kind: str, heads: int) -> int:
    """The number of key and value heads."""
    if kind == "gpt_bigcode":
        return 1 if text.get("multi_query") else heads
    if kind == "falcon" and not text.get("new_decoder_architecture"):
        return 1 if text.get("multi_query") else heads
    nested = text.get("attn_config")
    inner = _number(nested, "kv_n_heads") if isinstance(nested, Mapping) else 0
    return inner or _number(text, "num_key_value_heads", "num_kv_heads") or heads


def _number(text: Mapping[str, Any], *names: str) -> int:
    found = next((text[name] for name in names if type(text.get(name)) is int and text[name] > 0), 0)
    return int(found)


def gate_up_parts(rows: int, cols: int, axis: int, *, interleaved: bool) -> dict[str, tuple[Runs, Runs]]:
    """The halves of a fused gate and up (rows, cols) whose outputs lie along `axis`; empty for an odd number of them.

    interleaved: gate and up take turns instead of lying one after the other.
    """
    outputs = (rows, cols)[axis]
    if outputs % 2:
        return {}
    half = outputs // 2
    halves = {
        "gate": Runs(start=0, width=1, stride=2, count=half) if interleaved else run(0, half),
        "up": Runs(start=1, width=1, stride=2, count=half) if interleaved else run(half, half),
    }
    whole = run(0, (rows, cols)[1 - axis])
    return {name: (chosen, whole) if axis == 0 else (whole, chosen) for name, chosen in halves.items()}


def expert_gate_up(gate_up: tuple[int, ...], down: tuple[int, ...] | None, kind: str) -> dict[str, tuple[Runs, Runs]]:
    """The halves of an expert's fused gate and up, from the shapes (experts, rows, cols) of both of its stacks.

    Stored (out, in) gate comes first, in every model that is so stored. Stored (in, out), which `down` gives away (its
    inputs are half of gate_up's outputs), the order is that of the model type `kind`; empty where that is not known.
    """
    _, rows, cols = gate_up
    if down is None or len(down) != 3 or not (cols == 2 * down[1] and rows == down[2]):
        return gate_up_parts(rows, cols, 0, interleaved=False)
    if kind in INPUTS_FIRST:
        return gate_up_parts(rows, cols, 1, interleaved=INPUTS_FIRST[kind])
    return {}


def kernel_parts(tensor: str, shape: tuple[int, ...]) -> list[Part]:
    """The k*k matrices (out, in) of a convolution's kernel (out, in, k, k)."""
    rows, inner, size = shape[0], shape[1], math.prod(shape[2:])
    return [
        Part(tensor=tensor, rows=run(0, rows), cols=Runs(start=i, width=1, stride=size, count=inner))
        for i in range(size)
    ]


def why_not(tensor: TensorInfo, *, convolution: bool, bias: bool) -> str:
    """Why a tensor has no spectrum here; empty when it has one.

    convolution, bias: by its name, a stack is a kernel, or the rows are biases (of several experts).
    """
    shape = tensor.shape
    if tensor.note:
        return tensor.note
    if len(shape) < 2:
        return f"{len(shape)}-D: not a matrix"
    if bias:
        return f"{len(shape)}-D: biases, not a matrix"
    if not tensor.readable:
        return f"stored as {tensor.dtype}: codes or integers, not the weights themselves"
    if len(shape) > 4 or (len(shape) == 3 and convolution):
        return f"{len(shape)}-D (a convolution): only matrices and 2-D convolutions are analysed"
    values = min(shape) if len(shape) == 2 else min(shape[1:] if len(shape) == 3 else shape[:2])
    values *= math.prod(shape[2:]) if len(shape) == 4 else 1
    if values < MIN_SIDE:
        each = " in each matrix of the stack" if len(shape) == 3 else ""
        plural = "" if values == 1 else "s"
        return f"only {values} singular value{plural}{each}, at least {MIN_SIDE} make a spectrum"
    return ""


def too_small(rows: int, cols: int) -> str:
    """Why a matrix of this size has no spectrum; empty when it has one."""
    least = min(rows, cols)
    return f"only {least} singular values, at least {MIN_SIDE} make a spectrum" if least < MIN_SIDE else ""

"""How many bytes autograd keeps for a block, counted on one block instead of guessed from its class.

A copy of the architecture with two blocks and a tiny vocabulary is built with random weights, two short sequences are
sent through it, and the storages that autograd saves are counted. A sequence of T tokens costs a T + b T^2 bytes (b is
zero where attention keeps no scores), and two lengths give both. What is saved does not depend on what the large
products give, so they are left out (`Unmultiplied`): the blocks of a 70B model are counted in a second, and their
weights, which are never written or read, take no memory.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from htsr.console import quiet_libraries
from owlore.blocks import find_parts, freeze
from owlore.models.loading import attention

MULTIPLY = {torch.ops.aten.mm: (0, 1), torch.ops.aten.addmm: (1, 2)}  # operator -> positions of its two factors
INITIALISE = (torch.ops.aten.normal_, torch.ops.aten.uniform_)

Prepare = Callable[[nn.Module], Collection[str] | None]
PROBES = (32, 64, 96)  # tokens, evenly spaced
TOY_VOCABULARY = 64


@dataclass(frozen=True)
class Cost:
    """Bytes of one sequence of T tokens: linear * T + quadratic * T^2.

    Attributes:
        linear: bytes a token.
        quadratic: bytes a pair of tokens; 0 where attention keeps no scores.
        fixed: bytes that are saved once, whatever the sequences; an adapter may save tensors as large as a weight, as
            DoRA does with the sum of both.
    """

    linear: float
    quadratic: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.linear + other.linear, self.quadratic + other.quadratic, self.fixed + other.fixed)

    def __call__(self, tokens: int) -> float:
        return self.linear * tokens + self.quadratic * tokens**2


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes a sequence that autograd saves.

    Attributes:
        trained: for a block whose parameters are trained.
        frozen: for a block whose parameters are not trained, but which a gradient passes through.
        boundary: for the hidden state between two blocks, all that checkpointing keeps.
        outside: for the final norm and what the head is given.
    """

    trained: Cost
    frozen: Cost
    boundary: Cost
    outside: Cost


class Unmultiplied(TorchDispatchMode):
    """Products of two matrices are zeros of the right shape, and nothing is drawn at random; all else is unchanged.

    Autograd works above this and records what it would record.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = func.overloadpacket
        if operator in INITIALISE:
            return args[0]
        if operator in MULTIPLY:
            left, right = (args[index] for index in MULTIPLY[operator])
            return left.new_zeros(left.shape[0], right.shape[1])
        return func(*args, **(kwargs or {}))


def measure_footprint(
    config: Any, *, dtype: torch.dtype, attn: str = "sdpa", prepare: Prepare | None = None, packed: bool = False
) -> Footprint:
    """Count on a two-block model of this configuration, without weights and network.

    Args:
        config: transformers configuration of the model.
        dtype: dtype of the weights.
        attn: attention implementation.
        prepare: puts an adapter into a model and returns the names of the trained parameters; None trains all of a
            block. An adapter may read the weights, so those of two blocks are made for it.
        packed: whether sequences hold several rows, kept apart by a mask that each block's attention may save in a form
            of its own.
    """
    with nullcontext() if prepare is not None else Unmultiplied():
        model = _toy(config, dtype, attn)
    names = None if prepare is None else prepare(model)
    probed = ((1,), (0,), ()) if names is None else ((1,), (0,), (), (0, 1))
    with Unmultiplied():
        counted = {blocks: [_saved(model, blocks, tokens, names, packed) for tokens in PROBES] for blocks in probed}
    # An adapter lies in nearly all blocks: what counts is a trained block that a gradient passes through.
    with_it, without = (counted[1,], counted[()]) if names is None else (counted[0, 1], counted[1,])
    hidden = model.config.get_text_config().hidden_size * torch.empty((), dtype=dtype).element_size()
    return Footprint(
        trained=_cost([more - less for more, less in zip(with_it, without, strict=True)]),
        frozen=_cost([both - top for both, top in zip(counted[0,], counted[1,], strict=True)]),
        boundary=Cost(float(hidden)),
        outside=_cost(counted[()]) + Cost(0.0, float(packed)),  # the mask itself, a byte a pair of tokens
    )


def _cost(counted: list[int]) -> Cost:
    """a, b and c of c + a T + b T^2 through the points of `PROBES`."""
    (s, t, _), (x, y, z) = PROBES, counted
    step = t - s
    quadratic = max(0.0, (z - 2 * y + x) / (2 * step**2))
    linear = (y - x) / step - quadratic * (s + t)
    return Cost(linear, quadratic, max(0.0, x - linear * s - quadratic * s**2))


def _toy(config: Any, dtype: torch.dtype, attn: str) -> Any:
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = 2
    text.vocab_size = TOY_VOCABULARY
    text.pad_token_id = text.bos_token_id = text.eos_token_id = 0
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:2]
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(small, dtype=dtype, **attention(attn)).train()


def _saved(model: nn.Module, trained: tuple[int, ...], tokens: int, names: Collection[str] | None,
           packed: bool) -> int:  # fmt: skip
    """Bytes that autograd saves in a forward of the decoder for one sequence, parameters not counted.

    Without a trained block the last norm's input is made to need a gradient, which gives what lies outside the blocks.
    """
    freeze(model)
    parts = find_parts(model)
    for name, parameter in parts.parameters(trained, ()).items():
        parameter.requires_grad_(names is None or name in names)
    handle = parts.modules[-1].register_forward_hook(_start_here) if not trained else None
    try:
        positions = torch.arange(tokens // 2).repeat(2)[None] if packed else None
        return saved_bytes(model, torch.zeros(1, tokens, dtype=torch.long), positions)
    finally:
        if handle is not None:
            handle.remove()


def _start_here(module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0].requires_grad_(True), *output[1:])
    return output.requires_grad_(True)


def saved_bytes(model: Any, input_ids: Tensor, position_ids: Tensor | None = None) -> int:
    """Bytes of the distinct storages that autograd saves in one forward of the decoder, beside the model's weights.

    Args:
        model: a causal language model.
        input_ids: tokens, of shape (sequences, tokens).
        position_ids: positions of the same shape, in packed sequences.
    """
    positions = {} if position_ids is None else {"position_ids": position_ids}
    held_by_model = {held.untyped_storage().data_ptr() for held in itertools.chain(model.parameters(), model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in held_by_model:
            kept[address] = tensor  # keeps the storage, so that no address is used twice
        return tensor

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = decoder(input_ids=input_ids, use_cache=False, **positions)[0]
    del hidden
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

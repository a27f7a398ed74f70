"""The parts of a causal language model that are trained or frozen together.

A parameter belongs to a decoder block or, outside the blocks, to one of the groups `embeddings` (with learned
positions), `norm` (every vector) and `head`; together they have all parameters. Tied weights are one parameter, which
is in both `embeddings` and `head`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from htsr.errors import BadInput
from htsr.model.blocks import find_blocks


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """The parameters of a model by part, as (name, parameter) with the first name of a tied parameter.

    Attributes:
        model: The model.
        modules: The decoder blocks.
        blocks: Parameters of each block.
        groups: Parameters of the groups `embeddings`, `norm` and `head`.
    """

    model: nn.Module
    modules: tuple[nn.Module, ...]
    blocks: tuple[tuple[tuple[str, nn.Parameter], ...], ...]
    groups: dict[str, tuple[tuple[str, nn.Parameter], ...]]

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    def block_of(self) -> dict[str, int]:
        """The block of each parameter inside blocks, by the parameter's name."""
        return {name: index for index, block in enumerate(self.blocks) for name, _ in block}

    def parameters(self, blocks: Iterable[int], groups: Iterable[str]) -> dict[str, nn.Parameter]:
        """Named parameters of these blocks and groups, each once."""
        chosen = {name: p for index in blocks for name, p in self.blocks[index]}
        return chosen | {name: p for group in groups for name, p in self.groups[group]}


def find_parts(model: nn.Module) -> ModelParts:
    """Find the parts of a model.

    Raises:
        BadInput: The model has no stack of decoder blocks, or two blocks share a parameter.
    """
    stack = find_blocks(model)
    names = dict(model.named_parameters())
    by_identity = {id(parameter): name for name, parameter in names.items()}
    blocks = tuple(_members(module, by_identity, names) for module in stack.modules)
    taken = [name for block in blocks for name, _ in block]
    if len(set(taken)) != len(taken):
        shared = sorted({name for name in taken if taken.count(name) > 1})
        raise BadInput(f"blocks share parameters ({shared[0]}, ...): they cannot be trained one at a time")
    outside = {name for name in names if name not in set(taken)}
    head = _group(model, "get_output_embeddings", by_identity, names, outside)
    inputs = _group(model, "get_input_embeddings", by_identity, names, outside)
    ends = {name for name, _ in head + inputs}
    rest = [(name, names[name]) for name in names if name in outside - ends]
    groups = {
        "embeddings": inputs + tuple(pair for pair in rest if pair[1].ndim > 1),
        "norm": tuple(pair for pair in rest if pair[1].ndim <= 1),
        "head": head,
    }
    return ModelParts(model=model, modules=stack.modules, blocks=blocks, groups=groups)


def freeze(model: nn.Module) -> None:
    """Set `requires_grad` of all parameters to False and drop their gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def _members(
    module: nn.Module, by_identity: dict[int, str], names: dict[str, nn.Parameter]
) -> tuple[tuple[str, nn.Parameter], ...]:
    found = dict.fromkeys(by_identity[id(parameter)] for parameter in module.parameters())
    return tuple((name, names[name]) for name in found)


def _group(
    model: nn.Module, getter: str, by_identity: dict[int, str], names: dict[str, nn.Parameter], outside: set[str]
) -> tuple[tuple[str, nn.Parameter], ...]:
    """Parameters outside the blocks of the module that a method of the model returns; none without the method."""
    access = getattr(model, getter, None)
    module = access() if access is not None else None
    if module is None:
        return ()
    return tuple(pair for pair in _members(module, by_identity, names) if pair[0] in outside)

"""The blocks of a module, found by structure, and the linear maps in a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from htsr.errors import BadInput
from htsr.model.names import choose_stacks, distinct_roles

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BlockStack:
    """The blocks of a model in order, an encoder's before a decoder's.

    Attributes:
        prefix: the path of the first list of blocks in the model.
        modules: the blocks.
        names: the path of each block.
    """

    prefix: str
    modules: tuple[nn.Module, ...]
    names: tuple[str, ...]


def find_blocks(model: nn.Module) -> BlockStack:
    """Find the blocks of a model by its structure.

    They are the longest outermost ModuleList or Sequential whose children are of one class and hold weights; the lists
    of an encoder and of a decoder are joined.

    Args:
        model: any module.

    Raises:
        BadInput: the model has no such list.
    """
    lists = _outermost_lists(model, same_class=True) or _outermost_lists(model, same_class=False)
    if not lists:
        raise BadInput(f"got a {type(model).__name__} without a list of blocks, expected an nn.ModuleList of layers")
    indexes = {name: set(range(len(modules))) for name, modules in lists.items()}
    sizes = {name: sum(p.numel() for m in modules for p in m.parameters()) for name, modules in lists.items()}
    stacks = choose_stacks(indexes, sizes)
    names = tuple(f"{prefix}.{i}" if prefix else str(i) for prefix in stacks for i in range(len(lists[prefix])))
    return BlockStack(stacks[0], tuple(m for prefix in stacks for m in lists[prefix]), names)


def _outermost_lists(model: nn.Module, *, same_class: bool) -> dict[str, list[nn.Module]]:
    from torch import nn

    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        children = list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        holds_weights = all(any(True for _ in child.parameters()) for child in children)
        if children and holds_weights and (not same_class or len({type(c) for c in children}) == 1):
            found[name] = children
    return found


def linear_maps(block: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """role -> (module with a 2-D weight, stored transposed) for every linear map inside a block."""
    maps = {}
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        is_lookup = hasattr(module, "num_embeddings")
        if name and getattr(weight, "ndim", 0) == 2 and not is_lookup:
            maps[name] = module
    roles = distinct_roles([(name, 0, name) for name in maps])
    return {roles[name]: (module, _is_conv1d(module)) for name, module in maps.items()}


def _is_conv1d(module: Any) -> bool:
    """Whether the weight is stored (inputs, outputs): transformers' Conv1D says so by `nf`, its number of outputs."""
    outputs = getattr(module, "nf", None)
    return isinstance(outputs, int) and module.weight.shape[1] == outputs

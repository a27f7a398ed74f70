"""A model without its weights, whose blocks are filled from the source one at a time.

The skeleton is built from the configuration with every large parameter on the meta device. What comes before the
blocks is filled at once, of the token embeddings the rows that the text needs; a block only while it is in use. So a
model streams through the memory of one block.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from htsr.errors import BadInput
from htsr.model.blocks import BlockStack, find_blocks
from htsr.model.layers import LayerView, views
from htsr.model.names import expert_role, role_of

if TYPE_CHECKING:
    from htsr.model.source import Source


Origin = str | list[list[str]]  # a tensor, or of a stack of experts the tensors of each, one below the other


class CannotStreamError(Exception):
    """The model cannot be run block by block and has to be loaded as a whole; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A model on the meta device, and where its weights are.

    Attributes:
        model: the model, without weights.
        stack: its blocks.
        names: parameter of `model` -> tensor in `source`.
        source: the open model.
        device: where the weights go when they are filled in.
    """

    model: nn.Module
    stack: BlockStack
    names: dict[str, Origin]  # parameter of `model` -> where it is in `source`
    source: Source
    device: torch.device

    @contextlib.contextmanager
    def filled(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights in fp32, for as long as the context lasts."""
        block = self.stack.modules[index]
        try:
            self.fill(name for name in self.names if name.startswith(f"{self.stack.names[index]}."))
            yield block
        finally:
            empty(block)

    def fill(self, names: Iterable[str]) -> None:
        """Give the named parameters their weights from the source."""
        for name in names:
            weights = self._read(self.names[name]).to(device=self.device, dtype=torch.float32)
            _set(self.model, name, weights.reshape(self.model.get_parameter(name).shape))

    def _read(self, origin: Origin) -> Tensor:
        if isinstance(origin, str):
            return self.source.read(origin)
        return torch.stack([torch.cat([self.source.read(part) for part in expert]) for expert in origin])

    def fill_tokens(self, ids: Tensor) -> None:
        """Put the rows of the token embeddings that `ids` name in the place of all of them."""
        name = _token_table(self.model)
        if name is not None and (tensor := self.names.get(f"{name}.weight")) is not None:
            known = torch.unique(ids.cpu())
            runs = torch.tensor_split(known, (torch.where(known.diff() != 1)[0] + 1).tolist())  # consecutive ids
            rows = torch.cat([self.source.rows(str(tensor), int(run[0]), int(run[-1]) + 1) for run in runs])
            rows = rows.to(device=self.device, dtype=torch.float32)
            self.model.set_submodule(
                name, TokenRows(known.to(self.device), rows, self.model.get_parameter(f"{name}.weight").shape[0])
            )

    @property
    def missing(self) -> list[str]:
        """Parameters that the source lacks. They hold NaN, which shows where they are used (a pooler's never are)."""
        return [name for name, _ in self.model.named_parameters() if name not in self.names]


class TokenRows(nn.Module):
    """The rows of a table of embeddings for the token ids `known` (ascending): what nn.Embedding returns for them."""

    def __init__(self, known: Tensor, rows: Tensor, num_embeddings: int) -> None:
        super().__init__()
        self.known, self.num_embeddings = known, num_embeddings
        self.weight = nn.Parameter(rows, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of ids (...), shape (..., width)."""
        return nn.functional.embedding(torch.searchsorted(self.known, ids), self.weight)


def input_embeddings(model: nn.Module) -> Any:
    """The module that token ids are looked up in; None for a model without one of its own."""
    access = getattr(model, "get_input_embeddings", None)
    try:
        return access() if access is not None else None
    except NotImplementedError:  # raised by a model of several towers
        return None


def _token_table(model: nn.Module) -> str | None:
    """The name of the table that token ids are looked up in; None where it is not a plain one."""
    table = input_embeddings(model)
    plain = type(table) is nn.Embedding and table.max_norm is None
    return next((name for name, module in model.named_modules() if plain and module is table), None)


def build_skeleton(source: Source, device: str | torch.device = "cpu") -> Skeleton:
    """Build the skeleton of a model, ready to embed tokens once `Skeleton.fill_tokens` has their rows.

    Args:
        source: an open model.
        device: where the weights go.

    Raises:
        CannotStreamError: the names or shapes that the configuration leads to are not those of the file.
        BadInput: there is no configuration, or none that transformers knows.
    """
    model = bare_model(model_config(source))
    if getattr(model.config, "is_encoder_decoder", False):
        raise CannotStreamError("the decoder's blocks read the encoder's output")
    stack = find_blocks(model)
    names = _match(model, source)
    names |= _match_by_role(model, stack, source, names)
    skeleton = Skeleton(model=model, stack=stack, names=names, source=source, device=torch.device(device))
    for block in stack.modules:
        empty(block)
    inside = tuple(f"{name}." for name in stack.names)
    later = f"{_token_table(model)}.weight"  # by `fill_tokens`
    skeleton.fill(name for name in skeleton.names if not name.startswith(inside) and name != later)
    for name in skeleton.missing:
        if name.startswith(inside):
            raise CannotStreamError(f"the file has no tensor for parameter {name}")
        _set(model, name, torch.full(model.get_parameter(name).shape, torch.nan, device=device))
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise CannotStreamError(f"buffer {name} is only known to the model's own loading code")
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, buffer.to(device))
    return skeleton


def model_config(source: Source) -> Any:
    """A transformers configuration object of a model, a copy that may be changed.

    Args:
        source: an open model.

    Raises:
        BadInput: there is no configuration, or its `model_type` is one that transformers does not know.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    config = getattr(source.module, "config", None)
    if isinstance(config, PretrainedConfig):
        return copy.deepcopy(config)
    if source.config is None:
        raise BadInput(f"{source.id}: no configuration (config.json), expected one beside the weights to calibrate")
    kind = str(source.config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise BadInput(f"{source.id}: got model_type {kind!r}, expected one that transformers knows")
    return CONFIG_MAPPING[kind].from_dict(dict(source.config))


def bare_model(config: Any) -> nn.Module:
    """The model without its head; parameters made by torch.empty (all large ones) on the meta device, buffers real."""
    from transformers import AutoModel

    config.use_cache = False
    config._experts_implementation = "eager"  # experts one by one, so that what enters each can be measured
    try:
        with EmptyOnMeta():
            model: nn.Module = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CannotStreamError(f"transformers cannot build it from its configuration alone ({error})") from error
    return model.eval().requires_grad_(False)


def empty(module: nn.Module) -> None:
    """Send the parameters of `module` back to the meta device."""
    for local, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            _set(module, local, parameter.data.to("meta"))


class EmptyOnMeta(TorchFunctionMode):
    """torch.empty on the meta device; constants such as rotary frequencies and masks are computed as always."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def _match(model: nn.Module, source: Source) -> dict[str, Origin]:
    """The source's name of every parameter; a checkpoint may carry the name of the model's base in front."""
    shapes = {info.name: info.shape for info in source.tensors}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names: dict[str, Origin] = {}
    for name, parameter in model.named_parameters():
        candidates = (name, prefix + name, name.removeprefix(prefix))
        found = next((c for c in candidates if c in shapes), None)
        if found is None:
            continue
        if tuple(shapes[found]) != tuple(parameter.shape):
            raise CannotStreamError(
                f"{found} has shape {tuple(shapes[found])}, the model wants {tuple(parameter.shape)}"
            )
        names[name] = found
    return names


def _match_by_role(
    model: nn.Module, stack: BlockStack, source: Source, known: Mapping[str, Origin]
) -> dict[str, Origin]:
    """Find the matrices of blocks that have other names in the file, by block, role and shape.

    (transformers 5 holds experts in one parameter where published files have a tensor for each.)
    """
    missing = {name: p for name, p in model.named_parameters() if name not in known and p.ndim in (2, 3)}
    if not missing:
        return {}
    by_key = {(view.block, view.role): view for view in views(source) if not view.part_of}
    found: dict[str, Origin] = {}
    for index, block in enumerate(stack.names):
        for name, parameter in missing.items():
            if name.startswith(f"{block}."):
                rest, shape = name.removeprefix(f"{block}."), tuple(parameter.shape)
                origin = (
                    _experts(by_key, index, rest, shape, source)
                    if len(shape) == 3
                    else _same_shape(by_key.get((index, role_of(rest))), shape)
                )
                if origin is not None:
                    found[name] = origin
    return found


def _same_shape(view: LayerView | None, shape: tuple[int, ...]) -> str | None:
    return view.tensor if view is not None and view.part is None and (view.rows, view.cols) == shape else None


def _experts(
    by_key: Mapping[tuple[int | None, str], LayerView], index: int, rest: str, shape: tuple[int, ...], source: Source
) -> Origin | None:
    """A stack (experts, out, in) from the tensors of its experts, gate before up, or the same stack by another name."""
    experts = []
    for number in range(shape[0]):
        role = expert_role(rest, number)
        roles = [role.removesuffix("gate_up") + part for part in ("gate", "up")] if role.endswith("gate_up") else [role]
        members = [by_key[index, r] for r in roles if (index, r) in by_key]
        if len(members) != len(roles) or (index, f"experts.{shape[0]}.down") in by_key:
            return None
        experts.append(members)
    stored = {view.stored for members in experts for view in members}
    if len(stored) == 1 and source.info(name := stored.pop()).shape == shape:
        return name
    complete = all(view.part is None and view.cols == shape[2] for members in experts for view in members)
    tall = all(sum(view.rows for view in members) == shape[1] for members in experts)
    return [[view.tensor for view in members] for members in experts] if complete and tall else None


def _set(module: nn.Module, local: str, weights: Tensor) -> None:
    path, _, leaf = local.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(weights, requires_grad=False))

"""A model without its weights, whose blocks are filled from the source one at a time.

The skeleton is built from the configuration with every large parameter on the meta device. What comes before the
blocks is filled at once; a block only while it is in use. So a model streams through the memory of one block.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from htsr.errors import BadInput
from htsr.model.layers import BlockStack, find_blocks

if TYPE_CHECKING:
    from htsr.model.source import Source


class CannotStreamError(Exception):
    """The model has to be loaded as a whole; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A model on the meta device, its stack of blocks, and where each of its parameters is in the source."""

    model: nn.Module
    stack: BlockStack
    names: dict[str, str]  # parameter of `model` -> tensor of `source`
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
            weights = self.source.read(self.names[name]).to(device=self.device, dtype=torch.float32)
            _set(self.model, name, weights.reshape(self.model.get_parameter(name).shape))

    @property
    def missing(self) -> list[str]:
        """Parameters that the source has not; they hold NaN, which shows where they are used (a pooler's never)."""
        return [name for name, _ in self.model.named_parameters() if name not in self.names]


def build_skeleton(source: Source, device: str | torch.device = "cpu") -> Skeleton:
    """The skeleton of the source's model, ready to embed tokens.

    Raises:
        CannotStreamError: the names or shapes that the configuration leads to are not those of the file.
        BadInput: there is no configuration, or none that transformers knows.
    """
    model = bare_model(model_config(source))
    if getattr(model.config, "is_encoder_decoder", False):
        raise CannotStreamError("the decoder's blocks read the encoder's output")
    stack = find_blocks(model)
    skeleton = Skeleton(
        model=model, stack=stack, names=_match(model, source), source=source, device=torch.device(device)
    )
    for block in stack.modules:
        empty(block)
    inside = tuple(f"{name}." for name in stack.names)
    skeleton.fill(name for name in skeleton.names if not name.startswith(inside))
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
    """A transformers configuration object of the source, a copy that may be changed.

    Raises:
        BadInput: no configuration, or a `model_type` that transformers does not know.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    own = getattr(source.module, "config", None)
    if isinstance(own, PretrainedConfig):
        return copy.deepcopy(own)
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
        with _EmptyOnMeta():
            model: nn.Module = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CannotStreamError(f"transformers cannot build it from its configuration alone ({error})") from error
    return model.eval().requires_grad_(False)


def empty(module: nn.Module) -> None:
    """Send the parameters of `module` back to the meta device."""
    for local, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            _set(module, local, parameter.data.to("meta"))


class _EmptyOnMeta(TorchFunctionMode):
    """torch.empty on the meta device; constants such as rotary frequencies and masks are computed as always."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def _match(model: nn.Module, source: Source) -> dict[str, str]:
    """The source's name of every parameter; a checkpoint may carry the name of the model's base in front."""
    shapes = {info.name: info.shape for info in source.tensors}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {}
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


def _set(module: nn.Module, local: str, weights: Tensor) -> None:
    path, _, leaf = local.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(weights, requires_grad=False))

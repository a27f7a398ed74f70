"""Which linear maps of a model a configuration names, and their shapes as (outputs, inputs)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from owlore.adapters.nf4_linear import Nf4Linear

DEFAULT_TARGETS: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # PEFT's choice by model type


@dataclass(frozen=True, kw_only=True)
class Target:
    """A linear map: its name in the model, the module (adapters taken off), its shape (outputs, inputs)."""

    name: str
    module: nn.Module
    shape: tuple[int, int]


def find_targets(model: nn.Module, config: Any) -> list[Target]:
    """The maps that `config.target_modules` (and its companions) match, in the model's order.

    Raises: ValueError when nothing matches, TypeError when a match is no linear map.
    """
    config = copy.copy(config)
    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in DEFAULT_TARGETS:
            raise ValueError(f"got no target_modules and a model of type {kind!r}: name the modules to adapt")
        config.target_modules = DEFAULT_TARGETS[kind]
    config = _maybe_include_all_linear_layers(config, model)
    found = []
    for name, module in _outer_modules(model):
        if name and check_target_module_exists(config, name):
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            found.append(Target(name=name, module=base, shape=shape_of(base, name)))
    if not found:
        raise ValueError(f"target_modules {config.target_modules!r} match no module of the model")
    return found


def shape_of(module: nn.Module, name: str = "") -> tuple[int, int]:
    """(outputs, inputs) of a linear map, quantised or not.

    Raises: TypeError for a module that is none.
    """
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return int(outputs), int(inputs)
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not all(isinstance(size, int) for size in sizes):
        raise TypeError(f"{name or 'the module'} is a {type(module).__name__}, expected a linear map")
    return sizes  # type: ignore[return-value]


def is_plain(module: nn.Module) -> bool:
    """Whether the weight is an ordinary float tensor that can be read and written."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and weight.dtype in _FLOATS


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def matrix_of(module: nn.Module) -> Tensor:
    """The weight (outputs x inputs) as a view that shares its memory; the module must be plain."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device of a linear map, and the dtype that adapters beside it train in: fp32, or fp64 beside fp64."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device, torch.float64 if tensor.dtype == torch.float64 else torch.float32
    raise TypeError(f"a {type(module).__name__} without parameters or buffers cannot be adapted")


def is_shared(model: nn.Module, module: nn.Module) -> bool:
    """Whether the module's weight is another module's too (a head tied to the embeddings)."""
    own = getattr(module, "weight", None)
    return any(m is not module and getattr(m, "_parameters", {}).get("weight") is own for m in model.modules())


def dense_weight(module: nn.Module) -> Tensor:
    """The values of the weight (outputs x inputs), dequantised where it is quantised."""
    if is_plain(module):
        return matrix_of(module)
    if isinstance(module, Nf4Linear):
        return module.dense()
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module).detach()


def count_2d(model: nn.Module) -> int:
    """Entries of all 2-D parameters, tied ones once, quantised ones by what they stand for; adapters left out."""
    sizes: dict[int, int] = {}
    for _, module in _outer_modules(model):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if hasattr(base, "in_features") and hasattr(base, "out_features") and not is_plain(base):
            outputs, inputs = shape_of(base)
            sizes[id(base)] = outputs * inputs
            continue
        sizes |= {id(p): p.numel() for p in base.parameters(recurse=False) if p.ndim == 2}
    return sum(sizes.values())


def _outer_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named modules without the insides of adapter layers."""
    inside: list[str] = []
    found = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        found.append((name, module))
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
    return found

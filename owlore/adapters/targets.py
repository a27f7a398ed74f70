"""The linear layers of a model that a configuration targets, and their weights as (outputs x inputs)."""

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
    """A linear layer that a configuration targets.

    Attributes:
        name: Its name in the model.
        module: The layer, without the layers of adapters around it.
        shape: (outputs, inputs).
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]


def find_targets(model: nn.Module, config: Any) -> list[Target]:
    """The layers that a configuration targets, in the model's order.

    Args:
        model: The model, with or without adapters.
        config: A PEFT configuration: target_modules, exclude_modules, layers_to_transform and layers_pattern are read.

    Raises:
        ValueError: Nothing matches, or there are no target_modules and no default for the model type.
        TypeError: A match is not a linear layer.
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
    """(outputs, inputs) of a linear layer, quantised or not.

    Raises:
        TypeError: The module is not a linear layer.
    """
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return int(outputs), int(inputs)
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not all(isinstance(size, int) for size in sizes):
        raise TypeError(f"{name or 'the module'} is a {type(module).__name__}, expected a linear layer")
    return sizes  # type: ignore[return-value]


def is_plain(module: nn.Module) -> bool:
    """Whether the weight is an ordinary float tensor that can be read and written."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and weight.dtype in _FLOATS


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def matrix_of(module: nn.Module) -> Tensor:
    """The weight (outputs x inputs) of a plain layer, as a view that shares its memory."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device of a linear layer, and the dtype of adapters for it: fp64 for a layer in fp64, else fp32."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device, torch.float64 if tensor.dtype == torch.float64 else torch.float32
    raise TypeError(f"a {type(module).__name__} without parameters or buffers cannot be adapted")


def is_shared(model: nn.Module, module: nn.Module) -> bool:
    """Whether another module has the same weight (a head tied to the embeddings)."""
    weight = getattr(module, "weight", None)
    return any(m is not module and getattr(m, "_parameters", {}).get("weight") is weight for m in model.modules())


def dense_weight(module: nn.Module) -> Tensor:
    """The weight (outputs x inputs), dequantised if it is quantised."""
    if is_plain(module):
        return matrix_of(module)
    if isinstance(module, Nf4Linear):
        return module.dense()
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module).detach()


def count_2d(model: nn.Module) -> int:
    """Number of entries of all 2-D parameters without adapters; tied ones count once, quantised ones as unquantised."""
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
    """Named modules without those inside adapter layers."""
    inside: list[str] = []
    found = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        found.append((name, module))
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
    return found

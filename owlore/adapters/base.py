"""What SMT and DoTA share as PEFT methods: fields of the configuration, the tuner, and the state of a layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from owlore.adapters.targets import DEFAULT_TARGETS, shape_of


@dataclass
class LinearConfig(PeftConfig):
    """The fields of a configuration whose targets are linear layers; the subclasses describe them."""

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        one_of("bias", self.bias, ["none"])


def one_of(name: str, value: Any, known: Any) -> None:
    """Check that a field has one of its known values.

    Raises:
        ValueError: It has another value.
    """
    if value not in known:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(str, known))}")


class LinearTuner(BaseTuner):
    """A PEFT tuner that puts a `tuner_layer_cls` around every target."""

    target_module_mapping = DEFAULT_TARGETS

    def adapt(self, target: nn.Module, name: str, adapter_name: str, config: Any) -> nn.Module:
        """The layer for a target, with the adapter added; the target itself if it is such a layer or needs none.

        Args:
            target: The target module, possibly a layer of an earlier adapter.
            name: Name of the target in the model.
            adapter_name: Name of the adapter.
            config: Its configuration.
        """
        raise NotImplementedError

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = self.adapt(target, current_key, adapter_name, peft_config)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)


class AdaptedLinear(nn.Module, BaseTunerLayer):
    """A linear layer (nn.Linear, Conv1D or quantised) and the state that PEFT keeps beside it.

    Args:
        base_layer: The layer, or another adapter's layer around it.
        name: Name of the layer in the model, for messages.
    """

    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str = "") -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = shape_of(self.get_base_layer(), name)
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []

    def _present(self, names: Iterable[str]) -> list[str]:
        """Those of the adapters that this layer has."""
        return [name for name in names if name in getattr(self, self.adapter_layer_names[0])]

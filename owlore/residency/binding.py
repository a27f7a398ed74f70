"""Which storage a block's parameters have at the moment: a slot's, their own, or none.

Outside of a lease a streamed parameter is a single NaN expanded to its shape: names, shapes and counts are right, no
memory is held, and reading it by mistake shows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from owlore.kernels.linear import input_of, linear_kind
from owlore.patches import PatchStack
from owlore.residency.blob_layout import BlobLayout, Weight
from owlore.residency.formats import FORMATS, Format, Raw
from owlore.residency.frozen_linear import PackedWeight, frozen_linear

Views = Mapping[str, Mapping[str, Tensor]]


def layout_of(module: nn.Module, form: Format) -> BlobLayout:
    """The layout of a block: the matrices of plain linear maps in `form`, everything else as it is."""
    matrices = {id(m.weight) for m in module.modules() if linear_kind(m) is not None}
    raw = FORMATS[Raw.name]
    weights = [
        Weight(name=name, shape=tuple(p.shape), dtype=p.dtype, form=form if id(p) in matrices else raw)
        for name, p in module.named_parameters()
    ]
    return BlobLayout(tuple(weights))


class Binding:
    """The parameters of one block. `names` are those that the whole model knows them by, in the module's order."""

    def __init__(
        self,
        block: int,
        module: nn.Module,
        names: Sequence[str],
        layout: BlobLayout,
        device: torch.device,
        patches: PatchStack,
    ) -> None:
        self.parameters = dict(module.named_parameters())
        self.local = dict(zip(names, self.parameters, strict=True))
        self.own = False  # parameters have exact values for as long as the block is drawn
        self._borrowed = False  # and they lie in the store
        self._placeholders = {name: placeholder(p, device) for name, p in self.parameters.items()}
        forms = {weight.name: weight for weight in layout.weights if not weight.form.exact}
        self._packed = {name: PackedWeight(weight, block) for name, weight in forms.items()}
        for name, m in module.named_modules():
            packed, transposed = self._packed.get(f"{name}.weight"), linear_kind(m)
            if packed is not None and transposed is not None:
                patches.replace_forward(m, self._wrapped(m, m.forward, packed, transposed))

    def _wrapped(
        self, module: nn.Module, forward: Callable[..., Any], packed: PackedWeight, transposed: bool
    ) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Tensor, **named: Tensor) -> Tensor:
            x = input_of(args, named)
            if self.own:
                own: Tensor = forward(x)
                return own
            bias: Any = module.bias
            return frozen_linear(x, packed, bias, transposed=transposed)

        return run

    # -- three states ------------------------------------------------------------------------------------------------

    def bind(self, views: Views, *, keeps: bool = False) -> None:
        """Let the parameters be these views. keeps: lossy matrices stay dense once they were made so."""
        for name, parameter in self.parameters.items():
            packed = self._packed.get(name)
            if packed is None:
                parameter.data = views[name]["weight"]
            else:
                packed.lend(views[name], keeps=keeps)

    def unbind(self) -> None:
        """Let the parameters be placeholders."""
        for name, parameter in self.parameters.items():
            packed = self._packed.get(name)
            if packed is not None:
                packed.lend(None)
            parameter.data = self._placeholders[name]
        self.own = self._borrowed = False

    def take(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Give the parameters memory of their own on the device, with these values."""
        for name, parameter in self.parameters.items():
            fresh = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            parameter.data = fresh.copy_(tensors[name], non_blocking=True)
        self.own = True

    def adopt(self, views: Views) -> None:
        """Train where the weights lie: exact views that are on the device already."""
        self.bind(views)
        self.own = self._borrowed = True

    def values(self) -> dict[str, Tensor]:
        """The parameters' values where they are bound or have memory of their own."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    def num_bytes(self) -> int:
        """Bytes of the parameters' own memory."""
        if not self.own or self._borrowed:
            return 0
        return sum(p.numel() * p.element_size() for p in self.parameters.values())


def placeholder(parameter: Tensor, device: torch.device) -> Tensor:
    """A tensor of that shape and dtype which holds one value, NaN."""
    return torch.full((), float("nan"), dtype=parameter.dtype, device=device).expand(parameter.shape)

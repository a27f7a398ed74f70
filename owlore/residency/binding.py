"""The storage of a block's parameters at the moment: views of a blob under a lease, their own memory, or none.

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
from owlore.residency.blob_layout import BlobLayout, Views, Weight
from owlore.residency.formats import FORMATS, Format, Raw
from owlore.residency.frozen_linear import PackedWeight, frozen_linear


def layout_of(module: nn.Module, form: Format) -> BlobLayout:
    """The layout of a block: the matrices of plain linear maps in `form`, all other parameters with their own bits."""
    matrices = {id(m.weight) for m in module.modules() if linear_kind(m) is not None}
    raw = FORMATS[Raw.name]
    weights = [
        Weight(name=name, shape=tuple(p.shape), dtype=p.dtype, form=form if id(p) in matrices else raw)
        for name, p in module.named_parameters()
    ]
    return BlobLayout(tuple(weights))


class Binding:
    """The parameters of one block, and the forwards of its linear maps, which read quantised weights under a lease.

    Args:
        block: index of the block, for messages.
        module: the block.
        names: the model's names of the block's parameters, in the module's order.
        layout: the block's layout.
        device: where the block computes.
        patches: the stack on which the forwards of linear maps are replaced.

    Attributes:
        parameters: name inside the block -> parameter.
        local_names: the model's name -> name inside the block.
        exact: whether the parameters hold exact values, so that linear maps run as they are.
    """

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
        self.local_names = dict(zip(names, self.parameters, strict=True))
        self.exact = False
        self._owns_memory = False
        self._placeholders = {name: placeholder(p, device) for name, p in self.parameters.items()}
        self._packed = {w.name: PackedWeight(w, block) for w in layout.weights if not w.form.exact}
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
            if self.exact:
                exact: Tensor = forward(x)
                return exact
            bias: Any = module.bias
            return frozen_linear(x, packed, bias, transposed=transposed)

        return run

    def bind(self, views: Views, *, cache_dense: bool = False) -> None:
        """Let the parameters be views of the block's blob.

        Args:
            views: weight -> field -> view.
            cache_dense: whether a quantised matrix is made dense once and kept until `unbind`.
        """
        for name, parameter in self.parameters.items():
            packed = self._packed.get(name)
            if packed is None:
                parameter.data = views[name]["weight"]
            else:
                packed.set_fields(views[name], cache_dense=cache_dense)

    def unbind(self) -> None:
        """Let the parameters be placeholders."""
        for name, parameter in self.parameters.items():
            packed = self._packed.get(name)
            if packed is not None:
                packed.set_fields(None)
            parameter.data = self._placeholders[name]
        self.exact = self._owns_memory = False

    def copy_from(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Give the parameters memory of their own on `device`, filled from `tensors` by name inside the block."""
        for name, parameter in self.parameters.items():
            fresh = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            parameter.data = fresh.copy_(tensors[name], non_blocking=True)
        self.exact = self._owns_memory = True

    def bind_exact(self, views: Views) -> None:
        """Let the parameters be exact views that are on the device already, and train them there."""
        self.bind(views)
        self.exact = True

    def values(self) -> dict[str, Tensor]:
        """The present values of the parameters by name inside the block."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    def num_bytes(self) -> int:
        """Bytes of the parameters' own memory."""
        return sum(p.numel() * p.element_size() for p in self.parameters.values()) if self._owns_memory else 0


def placeholder(parameter: Tensor, device: torch.device) -> Tensor:
    """A tensor of that shape and dtype which holds one value, NaN."""
    return torch.full((), float("nan"), dtype=parameter.dtype, device=device).expand(parameter.shape)

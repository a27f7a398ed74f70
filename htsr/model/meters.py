"""Measure what enters the linear maps of a block while a model runs: modules by hooks, fused experts by listening."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from htsr.errors import BadInput
from htsr.model.blocks import linear_maps
from htsr.model.fused import INPUTS_FIRST, gate_up_parts
from htsr.model.names import expert_role


@dataclass(frozen=True, kw_only=True)
class MeasuredMap:
    """A linear map y = W x and the sizes of its inputs.

    Attributes:
        role: what the map does in its block.
        weight: W, shape (out, in).
        square_sums: sum of x_j squared over the tokens of each half of the windows, shape (2, in), float64.
    """

    role: str
    weight: Tensor
    square_sums: Tensor


@dataclass(frozen=True, kw_only=True)
class MeasuredBlock:
    """The linear maps of one block.

    Attributes:
        index: number of the block.
        maps: its maps; those of a streamed model are removed when the next block is requested.
    """

    index: int
    maps: list[MeasuredMap]

    @property
    def size(self) -> int:
        """The number of weights of all maps."""
        return sum(each.weight.numel() for each in self.maps)


class InputMeter:
    """A context that sums the squares of what enters each linear map of a block, by forward hooks.

    Attributes:
        half: 0 or 1, the half of the windows that the inputs now belong to.
    """

    def __init__(self, block: nn.Module) -> None:
        self.modules = linear_maps(block)
        self.half = 0
        self.sums: dict[tuple[str, int], Tensor] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> InputMeter:
        for role, (module, _) in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(role)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None

    def maps(self) -> Iterator[MeasuredMap]:
        """What was summed so far; a map that no token reached has zero norms."""
        for role, (module, transposed) in self.modules.items():
            weight = module.get_parameter("weight").detach()
            weight = weight.t() if transposed else weight
            yield MeasuredMap(role=role, weight=weight, square_sums=_halves(self.sums, role, weight))

    def _hook(self, role: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares, key = self._squares(inputs[0]), (role, self.half)
            self.sums[key] = self.sums[key] + squares if key in self.sums else squares

        return add

    def _squares(self, x: Tensor) -> Tensor:
        """Sum over tokens of x squared; q, k and v read the same tensor, so the last answer is kept."""
        if self._last is not None and self._last[0] is x and self._last[1] == x._version:
            return self._last[2]
        squares = square_sums(x)
        self._last = (x, x._version, squares)
        return squares


class ExpertMeter(TorchFunctionMode):
    """A context that sums the squares of what enters each expert, where a block holds its experts as one 3-D parameter.

    No module stands for a single expert, so there is nothing to hook. But each expert is applied as a linear map whose
    weight is a slice of that parameter, or all of them are in one batched product; this mode sees every such call.

    Attributes:
        half: as in `InputMeter`.
    """

    def __init__(self, blocks: Sequence[nn.Module], kind: str = "") -> None:
        super().__init__()
        self.kind = kind  # the model's type, which tells how a fused gate and up is laid out
        found = [parameter for block in blocks for _, parameter in _expert_stacks(block)]
        self.stacks = {parameter.untyped_storage().data_ptr(): parameter for parameter in found}
        self.half = 0
        self.sums: dict[tuple[tuple[int, int], int], Tensor] = {}
        self.transposed: dict[int, bool] = {}

    def when_needed(self) -> contextlib.AbstractContextManager[Any]:
        """This mode when the blocks hold such experts, else a context that does nothing: it slows every operation."""
        return self if self.stacks else contextlib.nullcontext()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            self._record(args[0], args[1], transposed=False)
        elif function in MATRIX_PRODUCTS:
            self._record(args[0], args[1], transposed=True)
        return function(*args, **(kwargs or {}))

    def maps(self, block: nn.Module) -> Iterator[MeasuredMap]:
        """The linear maps of every expert of a block; a fused gate and up gives two, as files have them.

        Args:
            block: one of the blocks that the meter was made for.

        Raises:
            BadInput: the experts were not applied one at a time, so that nothing is known about their inputs.
        """
        for name, parameter in _expert_stacks(block):
            storage = parameter.untyped_storage().data_ptr()
            if storage not in self.transposed:
                raise BadInput(f"{name}: its experts are not applied one by one, expected that to measure their inputs")
            # whether gate and up take turns in a fused stack; None where that is not known
            interleaved = INPUTS_FIRST.get(self.kind) if self.transposed[storage] else False
            for index in range(parameter.shape[0]):
                weight = parameter.detach()[index]
                weight = weight.t() if self.transposed[storage] else weight
                sums = _halves(self.sums, (storage, index), weight)
                for role, part in _expert_roles(name, index, weight, interleaved):
                    yield MeasuredMap(role=role, weight=part, square_sums=sums)

    def _record(self, x: Tensor, weight: Tensor, *, transposed: bool) -> None:
        storage = weight.untyped_storage().data_ptr()
        stack = self.stacks.get(storage)
        if stack is None or weight.shape not in (stack.shape, stack.shape[1:]):
            return
        if weight.ndim == 3:  # all experts in one batched product
            inputs = dict(enumerate(x)) if x.ndim == 3 else {}
        else:
            inputs = {(weight.storage_offset() - stack.storage_offset()) // stack.stride(0): x}
        for index, tokens in inputs.items():
            squares, key = square_sums(tokens), ((storage, index), self.half)
            self.sums[key] = self.sums[key] + squares if key in self.sums else squares
            self.transposed[storage] = transposed


MATRIX_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)


ROWS_IN_FP32 = 256  # of a sum in float32; what lies in cache is summed four times as fast as in float64


def square_sums(x: Tensor) -> Tensor:
    """Sum over tokens of x_j squared, shape (in,), float64, for x of shape (..., in); within 1e-7 of the exact sum."""
    rows = x.reshape(-1, x.shape[-1])
    parts = [part.to(torch.float32).square().sum(dim=0) for part in rows.split(ROWS_IN_FP32)]
    return torch.stack(parts).sum(dim=0, dtype=torch.float64)


def _expert_stacks(block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The 3-D parameters of a block but for kernels of convolutions, which are no linear maps."""
    for path, module in block.named_modules():
        for leaf, parameter in module.named_parameters(prefix=path, recurse=False):
            if parameter.ndim == 3 and not hasattr(module, "kernel_size"):
                yield leaf, parameter


def _expert_roles(name: str, index: int, weight: Tensor, interleaved: bool | None) -> Iterator[tuple[str, Tensor]]:
    """The role and weights (out, in) of one expert's matrix, of both halves of a fused gate and up."""
    role = expert_role(name, index)
    if not role.endswith("gate_up") or interleaved is None:
        yield role, weight
        return
    outputs, inputs = weight.shape
    for share, (rows, _) in gate_up_parts(outputs, inputs, 0, interleaved=interleaved).items():
        yield role.removesuffix("gate_up") + share, weight[torch.from_numpy(rows.indices())]


def _halves(sums: Mapping[tuple[Any, int], Tensor], key: Any, weight: Tensor) -> Tensor:
    """The sums of both halves under `key`, zeros where no token came, shape (2, in)."""
    zeros = weight.new_zeros(weight.shape[1], dtype=torch.float64)
    return torch.stack([sums.get((key, half), zeros) for half in (0, 1)])

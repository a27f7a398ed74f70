"""Walk a model block by block over calibration windows and measure what enters each linear map.

Streaming: recorders stand in for the blocks while the windows are embedded and note what each block is called with;
then one block at a time is filled, run over every window and emptied again. A model that cannot be streamed, or is
no Hugging Face model, is run as it is, with hooks. The two halves of the windows are summed apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from htsr.model.blocks import find_blocks
from htsr.model.fused import model_type
from htsr.model.meters import ExpertMeter, InputMeter, MeasuredBlock
from htsr.model.skeleton import CannotStreamError, Skeleton

TOKENS_PER_FORWARD = 1024  # keeps the matrix units busy and a small model's activations in cache; a large one's are
# small beside a block


@dataclass(frozen=True)
class Batch:
    """Some windows (n, T), all of the first (0) or of the second half of all windows (1)."""

    half: int
    ids: Tensor


@torch.no_grad()
def record_calls(skeleton: Skeleton, windows: Tensor) -> Recorder:
    """What says how each block is called on the windows (n, T), which it must see beforehand.

    Raises:
        CannotStreamError: what a block is called with depends on what earlier blocks return.
    """
    skeleton.fill_tokens(windows)
    batches = batched(windows.to(skeleton.device))
    probe = batches[0].ids[:1, :8]
    for as_tuple in (False, True):
        if (recording := _pass(skeleton, probe, as_tuple, shift=0.0)) is not None:
            break
    else:
        raise CannotStreamError("its blocks are not called one after the other on hidden states")
    shifted = _pass(skeleton, probe, as_tuple, shift=1.0)
    if shifted is None or not _same(_arguments(recording), _arguments(shifted)):
        raise CannotStreamError("a block is called with what an earlier block returned beside the hidden states")
    if skeleton.missing and not recording.hidden.isfinite().all():
        raise CannotStreamError(f"the file has no tensor for parameter {skeleton.missing[0]}")
    if any(_pass(skeleton, batch.ids, as_tuple, shift=0.0) is None for batch in batches):
        raise CannotStreamError("its blocks are called differently on longer windows")
    return Recorder(skeleton, batches, as_tuple)


@dataclass(frozen=True)
class Recorder:
    """A skeleton, the windows in batches, and how its stand-ins return hidden states."""

    skeleton: Skeleton
    batches: Sequence[Batch]
    as_tuple: bool

    def recordings(self, count: int) -> Iterator[tuple[Batch, Recording]]:
        """The first batches, as many as hold `count` windows, with how the blocks are called on them."""
        for batch in self.batches:
            if count <= 0:
                return
            recording = _pass(self.skeleton, batch.ids, self.as_tuple, shift=0.0)
            assert recording is not None  # `record_calls` has seen it
            yield batch, recording
            count -= len(batch.ids)


def stream_blocks(
    recorder: Recorder, count: int, dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> Iterator[tuple[MeasuredBlock, ...]]:
    """Measure the blocks in order on the first `count` windows, with products in each of `dtypes`.

    A block has its weights only until the next one is asked for. In bfloat16 the linear maps and attention alone are
    rounded (autocast): hidden states and norms stay in float32.
    """
    skeleton = recorder.skeleton
    with torch.no_grad():
        batches = list(recorder.recordings(count))
    hidden = {dtype: [recording.hidden for _, recording in batches] for dtype in dtypes}
    calls = [(batch.half, recording.calls) for batch, recording in batches]
    del batches  # the hidden states of the embeddings go when the first block has read them
    for index in range(len(skeleton.stack.modules)):
        with skeleton.filled(index) as block:
            measured = tuple(_measure(skeleton, block, index, dtype, calls, hidden[dtype]) for dtype in dtypes)
            yield measured
            for each in measured:
                each.maps.clear()


@torch.no_grad()
def _measure(
    skeleton: Skeleton,
    block: nn.Module,
    index: int,
    dtype: torch.dtype,
    calls: Sequence[tuple[int, Sequence[Call]]],
    hidden: list[Tensor],
) -> MeasuredBlock:
    """Block `index` over every batch, (half, its calls); its outputs take the place of `hidden`."""
    meter, experts = InputMeter(block), ExpertMeter([block], _kind(skeleton.model))
    with meter, experts.listening(), _products_in(dtype, skeleton.device):
        for position, (half, batch) in enumerate(calls):
            meter.half = experts.half = half
            hidden[position] = batch[index].run(block, hidden[position])
    return MeasuredBlock(index=index, maps=[*meter.maps(), *experts.maps(block)])


def loaded_blocks(model: nn.Module, windows: Tensor) -> Iterator[MeasuredBlock]:
    """Measure the blocks of a loaded model in one pass with hooks; the model is left exactly as it was found.

    An encoder-decoder model reads the windows on both sides; its blocks are numbered encoder first.
    """
    stack = find_blocks(model).modules
    model = getattr(model, "base_model", model)  # without the head: nobody reads the logits
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    arguments, experts = _call_arguments(model), ExpertMeter(stack, _kind(model))
    try:
        model.eval()
        with experts.listening(), ExitStack() as hooks, torch.no_grad():
            meters = [hooks.enter_context(InputMeter(block)) for block in stack]
            for batch in batched(windows.to(device)):
                experts.half = batch.half
                for meter in meters:
                    meter.half = batch.half
                model(**{name: batch.ids if value is None else value for name, value in arguments.items()})
    finally:
        for module, mode in modes.items():
            module.training = mode
    for index, (block, meter) in enumerate(zip(stack, meters, strict=True)):
        yield MeasuredBlock(index=index, maps=[*meter.maps(), *experts.maps(block)])


def batched(windows: Tensor) -> list[Batch]:
    """The windows (n, T) in batches of about TOKENS_PER_FORWARD tokens, none across the middle of the windows."""
    middle, most = len(windows) - len(windows) // 2, max(1, TOKENS_PER_FORWARD // windows.shape[1])
    halves = (windows[:middle], windows[middle:])
    return [Batch(half, ids) for half, part in enumerate(halves) if len(part) for ids in part.split(most)]


def _products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products of float32 numbers in this dtype."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


@dataclass(frozen=True)
class Call:
    """What a block was called with beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for other hidden states."""
        kwargs = self.kwargs | ({"hidden_states": hidden} if self.by_name else {})
        out = block(**kwargs) if self.by_name else block(hidden, *self.args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]


@dataclass(frozen=True)
class Recording:
    """The hidden states before the first block, (n, T, width), and how each block is called."""

    hidden: Tensor
    calls: Sequence[Call]


@dataclass
class _Plan:
    """What a stand-in returns in a recording pass, and what the stand-ins saw."""

    as_tuple: bool
    shift: float
    hidden: list[Any] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


class _StandIn(nn.Module):
    """In a block's place: notes its call and passes the hidden states on; other attributes are the block's."""

    def __init__(self, block: nn.Module, plan: _Plan) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a child: its parameters stay out of the model's
        object.__setattr__(self, "_plan", plan)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        by_name = not args
        hidden = kwargs.pop("hidden_states") if by_name else args[0]
        self._plan.hidden.append(hidden)
        self._plan.calls.append(Call(args[1:], kwargs, by_name))
        passed = hidden + self._plan.shift if self._plan.shift else hidden
        return (passed,) if self._plan.as_tuple else passed


def _pass(skeleton: Skeleton, batch: Tensor, as_tuple: bool, shift: float) -> Recording | None:
    """One forward pass with stand-ins; None when hidden states did not come through all of them unharmed."""
    places = list(zip(skeleton.stack.names, skeleton.stack.modules, strict=True))
    plan = _Plan(as_tuple, shift)
    try:
        for name, block in places:
            skeleton.model.set_submodule(name, _StandIn(block, plan))
        skeleton.model(input_ids=batch)
    except (AttributeError, TypeError, IndexError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None  # tensors and tuples are told apart by what the model can do with them
    finally:
        for name, block in places:
            skeleton.model.set_submodule(name, block)
    tensors = all(isinstance(hidden, Tensor) for hidden in plan.hidden)
    whole = tensors and len(plan.calls) == len(places) and len({hidden.shape for hidden in plan.hidden}) == 1
    return Recording(plan.hidden[0], plan.calls) if whole else None


def _arguments(recording: Recording) -> list[Any]:
    return [(call.args, call.kwargs) for call in recording.calls]


def _same(a: Any, b: Any) -> bool:
    """Whether two recorded arguments are equal, tensors by value."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b)


def _kind(model: nn.Module) -> str:
    """The model's type by its configuration, empty without one."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    return model_type(to_dict()) if to_dict is not None else ""


def _call_arguments(model: nn.Module) -> dict[str, Any]:
    """How the model is called: None marks where the token ids go."""
    known = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"input_ids": None}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = None
    if "use_cache" in known:
        arguments["use_cache"] = False
    return arguments

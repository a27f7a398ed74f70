"""Walk a model block by block over calibration windows and measure what enters each linear map.

Streaming: recorders stand in for the blocks while the windows are embedded and note what each block is called with;
then one block at a time is filled, run over every window and emptied again. A model that cannot be streamed, or is
no Hugging Face model, is run as it is, with hooks. The two halves of the windows are summed apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from htsr.model.blocks import find_blocks
from htsr.model.fused import model_type
from htsr.model.meters import ExpertMeter, InputMeter, MeasuredBlock
from htsr.model.skeleton import CannotStreamError, Skeleton

TOKENS_PER_FORWARD = 1024  # keeps the matrix units busy and a small model's activations in cache; a large model's
# activations are small compared with a block


@dataclass(frozen=True)
class Batch:
    """Some windows of one half of the text.

    Attributes:
        half: 0 for the first half, 1 for the second.
        ids: token ids, shape (n, T).
    """

    half: int
    ids: Tensor


@torch.no_grad()
def record_calls(skeleton: Skeleton, windows: Tensor) -> Recorder:
    """Check that a model's blocks can be run one after the other on these windows.

    Args:
        skeleton: the model; the rows of its token embeddings are filled in.
        windows: token ids, shape (n, T).

    Returns:
        The recorder, which runs the model again to record how each block is called.

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
    if shifted is None or not _same(list(map(vars, recording.calls)), list(map(vars, shifted.calls))):
        raise CannotStreamError("a block is called with what an earlier block returned beside the hidden states")
    if skeleton.missing and not recording.hidden.isfinite().all():
        raise CannotStreamError(f"the file has no tensor for parameter {skeleton.missing[0]}")
    if any(_pass(skeleton, batch.ids, as_tuple, shift=0.0) is None for batch in batches):
        raise CannotStreamError("its blocks are called differently on longer windows")
    return Recorder(skeleton, batches, as_tuple)


@dataclass(frozen=True)
class Recorder:
    """Records how the blocks of a model are called.

    Attributes:
        skeleton: the model.
        batches: the windows in batches.
        as_tuple: whether a block has to return (hidden states,) instead of the tensor.
    """

    skeleton: Skeleton
    batches: Sequence[Batch]
    as_tuple: bool

    @torch.no_grad()
    def recordings(self, count: int) -> list[tuple[int, Recording]]:
        """The halves of the first batches, as many as hold `count` windows, and how the blocks are called on them."""
        found: list[tuple[int, Recording]] = []
        for batch in self.batches:
            if count > 0:
                recording = _pass(self.skeleton, batch.ids, self.as_tuple, shift=0.0)
                assert recording is not None  # `record_calls` has run this batch
                found.append((batch.half, recording))
            count -= len(batch.ids)
        return found


def stream_blocks(
    recorder: Recorder, count: int, dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> Iterator[tuple[MeasuredBlock, ...]]:
    """Measure the blocks in order; each has its weights only until the next one is requested.

    Args:
        recorder: from `record_calls`.
        count: number of windows, from the first.
        dtypes: precisions of the products, one measurement each. In bfloat16 the linear maps and attention alone are
            rounded (autocast): hidden states and norms stay in float32.
    """
    skeleton = recorder.skeleton
    recordings = recorder.recordings(count)
    hidden = {dtype: [recording.hidden for _, recording in recordings] for dtype in dtypes}
    calls = [(half, recording.calls) for half, recording in recordings]
    del recordings  # the hidden states of the embeddings go when the first block has read them
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
    """Run block `index` over every batch, (half, its calls), and replace `hidden` by its outputs."""
    meter, experts = InputMeter(block), ExpertMeter([block], _kind(skeleton.model))
    with meter, experts.when_needed(), _products_in(dtype, skeleton.device):
        for position, (half, batch) in enumerate(calls):
            meter.half = experts.half = half
            hidden[position] = batch[index].run(block, hidden[position])
    return MeasuredBlock(index=index, maps=[*meter.maps(), *experts.maps(block)])


def loaded_blocks(model: nn.Module, windows: Tensor) -> Iterator[MeasuredBlock]:
    """Measure the blocks of a loaded model in one pass with hooks; the model is left exactly as it was found.

    Args:
        model: an nn.Module. An encoder-decoder model reads the windows on both sides; its blocks are numbered encoder
            first.
        windows: token ids, shape (n, T).
    """
    stack = find_blocks(model).modules
    model = getattr(model, "base_model", model)  # without the head, whose logits are not needed
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    arguments, experts = _call_arguments(model), ExpertMeter(stack, _kind(model))
    try:
        model.eval()
        with experts.when_needed(), ExitStack() as hooks, torch.no_grad():
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
    """What a block was called with beside its hidden states.

    Attributes:
        args: the other positional arguments.
        kwargs: the other keywords.
        by_name: whether the hidden states were passed as the keyword `hidden_states`.
    """

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


def _pass(skeleton: Skeleton, batch: Tensor, as_tuple: bool, shift: float) -> Recording | None:
    """Run the model once with every block's forward replaced by one that records its call and passes its input on.

    Args:
        skeleton: the model; its blocks are as before afterwards.
        batch: token ids, shape (n, T).
        as_tuple: whether the replacement returns (hidden states,), as some models' blocks do, or the tensor.
        shift: a number that the replacement adds to the hidden states.

    Returns:
        The calls; None when the model failed, or its blocks were not called once each on hidden states of one shape.
    """
    seen: list[Any] = []
    calls: list[Call] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        by_name = not args
        hidden = kwargs.pop("hidden_states") if by_name else args[0]
        seen.append(hidden)
        calls.append(Call(args[1:], kwargs, by_name))
        passed = hidden + shift if shift else hidden
        return (passed,) if as_tuple else passed

    blocks = skeleton.stack.modules
    try:
        for block in blocks:
            vars(block)["forward"] = record
        skeleton.model(input_ids=batch)
    except (AttributeError, TypeError, LookupError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None  # whether blocks return a tensor or a tuple shows in what the model can do with it
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
    chained = all(isinstance(hidden, Tensor) for hidden in seen) and len({hidden.shape for hidden in seen}) == 1
    return Recording(seen[0], calls) if chained and len(calls) == len(blocks) else None


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
    arguments: dict[str, Any] = {"input_ids": None}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = None
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    return arguments

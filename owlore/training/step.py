"""One optimizer step: forward and backward of its micro-batches, gradient norm, clipped update.

`train_step` is the only training step of this project; the loop, the benchmarks and the test harnesses call it. Where
another library owns forward and backward (transformers' Trainer), `clipped_update` is the part that remains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from htsr.errors import NotFinite
from owlore.data.batches import MicroBatch
from owlore.kernels.seeds import seed_for
from owlore.optim import RotatingOptimizer
from owlore.training.backend import Backend
from owlore.training.distributed import ALONE, Ranks
from owlore.training.loss import CausalLoss


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step computed.

    Attributes:
        loss: mean loss in nats a trained token over the whole step, all processes; None where no token is trained.
        norm: gradient norm before clipping, projected gradients in their own space; None where `loss` is None.
        losses: the share of each micro-batch of this process in `loss`, in order.
    """

    loss: float | None = None
    norm: float | None = None
    losses: tuple[float, ...] = ()


def train_step(
    backend: Backend,
    optimizer: RotatingOptimizer,
    batches: Mapping[int, MicroBatch],
    *,
    step: int,
    lr: float,
    clip: float | None,
    seed: int,
    ranks: Ranks = ALONE,
) -> StepResult:
    """Take one optimizer step over micro-batches.

    The summed loss is divided by the step's number of trained tokens, over all processes, so that accumulation and
    data parallelism equal one large batch. A step without a trained token changes nothing.

    Args:
        backend: computes the gradients and gives them to `optimizer`.
        optimizer: holds the state of the active parameters.
        batches: this process's micro-batches by their index in the step, from which each has its random numbers.
        step: global step, from 0.
        lr: learning rate of this step.
        clip: limit of the gradient norm, None for none.
        seed: seed of the run; dropout depends on it, the step and the micro-batch.
        ranks: the processes that train together.

    Returns:
        The step's loss and gradient norm.

    Raises:
        NotFinite: the loss or the gradient norm is not finite; no update was applied.
    """
    (tokens,) = ranks.totals(sum(batch.num_trained for batch in batches.values()))
    if not tokens:
        return StepResult()
    losses: tuple[float, ...] = ()
    if batches:
        # The host waits for the device once, when all micro-batches are queued.
        losses = tuple(backend.gather(batches, int(tokens), seed=seed, step=step).tolist())
    else:
        optimizer.micro_batch(step, last=True)
    # Every rank learns of a loss that is not finite before any of them raises.
    (loss,) = ranks.totals(sum(losses, 0.0))
    if not math.isfinite(loss):
        raise NotFinite(f"loss {loss} at step {step + 1}: lower --lr, or look at the data and weights")
    norm = clipped_update(optimizer, step=step, lr=lr, clip=clip, loss=loss)
    return StepResult(loss=loss, norm=norm, losses=losses)


def clipped_update(
    optimizer: RotatingOptimizer, *, step: int, lr: float, clip: float | None, loss: float | None = None
) -> float:
    """Update the active parameters from the gradients that were gathered.

    Args:
        optimizer: has the gradients of all micro-batches of the step.
        step: global step, from 0.
        lr: learning rate of this step.
        clip: limit of the gradient norm, None for none.
        loss: loss of the step for the error message, where it is known.

    Returns:
        The gradients' norm before clipping.

    Raises:
        NotFinite: the norm is not finite; no update was applied.
    """
    total = optimizer.gradient_norm()
    norm = float(total)
    if not math.isfinite(norm):
        known = "" if loss is None else f" (loss {loss:.4g})"
        raise NotFinite(
            f"gradient norm {norm} at step {step + 1}{known}: lower the learning rate (--lr) or use bfloat16"
        )
    optimizer.update(lr, clip, total)
    return norm


def backward_micro_batches(
    loss: CausalLoss,
    optimizer: RotatingOptimizer,
    batches: Mapping[int, MicroBatch],
    tokens: int,
    *,
    seed: int,
    step: int,
    device: torch.device,
) -> Tensor:
    """Run forward and backward of each micro-batch of a model that lies on one device.

    Args:
        loss: gives the summed loss of a micro-batch.
        optimizer: takes each gradient in its hooks and frees it.
        batches: the micro-batches by their index in the step; at least one.
        tokens: trained tokens of the whole step, by which each loss is divided.
        seed: seed of the run.
        step: global step, from 0.
        device: where the model lies.

    Returns:
        The share of each micro-batch in the mean loss, fp32, on `device`.
    """
    losses, last = [], list(batches)[-1]
    for index, batch in batches.items():
        optimizer.micro_batch(step, last=index == last)
        with seeded(seed_for(seed, "dropout", step, index), device):
            mean = loss(**batch.on(device), num_trained=batch.num_trained) / tokens
            losses.append(mean.detach())
            if mean.requires_grad:
                (mean * optimizer.grad_scale).backward()
    return torch.stack(losses)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Set torch's global generators, from which dropout draws, to `seed` inside; restore them afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield

"""Held-out loss: token-weighted, streaming, nothing kept but two numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from owlore.data.batches import MicroBatch, collate, length_batches
from owlore.data.tokenise import Encoded
from owlore.training.distributed import ALONE, Ranks
from owlore.training.loss import CausalLoss

Losses = Callable[[Iterable[MicroBatch]], Iterable[Tensor]]


@torch.no_grad()
def held_out_loss(
    loss: CausalLoss,
    data: Encoded,
    *,
    batch: int,
    device: torch.device,
    losses: Losses | None = None,
    ranks: Ranks = ALONE,
) -> float:
    """Mean negative log-likelihood (nats) a trained token over the whole of `data`, in evaluation mode.

    losses: gives the summed loss of each micro-batch in another way than calling `loss` on it. ranks: each takes its
    share of the batches, and all get the mean.
    """
    training = loss.model.training
    loss.model.eval()
    every = (collate(data, rows) for rows in length_batches(data, batch)[ranks.rank :: ranks.size])
    total, tokens = 0.0, 0

    def counted() -> Iterator[MicroBatch]:
        nonlocal tokens
        for micro in every:
            if micro.num_trained:
                tokens += micro.num_trained
                yield micro

    try:
        one_by_one = (loss(micro.input_ids.to(device), micro.labels.to(device)) for micro in counted())
        for part in one_by_one if losses is None else losses(counted()):
            total += float(part)
    finally:
        loss.model.train(training)
    total, count = ranks.totals(total, tokens)
    return total / max(1, count)

"""Held-out loss: weighted by tokens, computed batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from owlore.data.batches import MicroBatch, collate, length_batches
from owlore.data.tokenise import Encoded
from owlore.training.distributed import ALONE, Ranks
from owlore.training.loss import CausalLoss, evaluation_mode

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

    Args:
        loss: gives the summed loss of a micro-batch.
        data: held-out rows.
        batch: rows of a micro-batch; it does not change the mean.
        device: where the model lies.
        losses: gives the summed loss of each micro-batch in another way than calling `loss` on it.
        ranks: each process takes its share of the batches, and all get the mean.
    """
    batches = (collate(data, rows) for rows in length_batches(data, batch)[ranks.rank :: ranks.size])
    total, tokens = 0.0, 0

    def counted() -> Iterator[MicroBatch]:
        nonlocal tokens
        for micro in batches:
            if micro.num_trained:
                tokens += micro.num_trained
                yield micro

    with evaluation_mode(loss.model):
        one_by_one = (loss(micro.input_ids.to(device), micro.labels.to(device)) for micro in counted())
        for part in one_by_one if losses is None else losses(counted()):
            total += float(part)
    total, count = ranks.totals(total, tokens)
    return total / max(1, count)

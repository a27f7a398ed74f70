"""Held-out loss: token-weighted, streaming, nothing kept but two numbers."""

from __future__ import annotations

import torch

from owlore.data.batches import collate, length_batches
from owlore.data.tokenise import Encoded
from owlore.train.loss import CausalLoss


@torch.no_grad()
def held_out_loss(loss: CausalLoss, data: Encoded, *, batch: int, device: torch.device) -> float:
    """Mean negative log-likelihood (nats) a trained token over the whole of `data`, in evaluation mode."""
    training = loss.model.training
    loss.model.eval()
    total, tokens = 0.0, 0
    try:
        for rows in length_batches(data, batch):
            micro = collate(data, rows)
            if micro.num_trained:
                total += float(loss(micro.input_ids.to(device), micro.labels.to(device)))
                tokens += micro.num_trained
    finally:
        loss.model.train(training)
    return total / max(1, tokens)

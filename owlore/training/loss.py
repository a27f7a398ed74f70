"""Summed next-token loss of a causal language model without its logits as a whole.

The decoder gives hidden states, and the head is applied in chunks. That is right only if the model's own forward is
head(decoder(x)) up to a scale and a soft cap, so it is compared with the model's own logits once, on a few tokens. A
model that computes more gets its own logits and one cross-entropy over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from owlore.kernels.cross_entropy import IGNORED, linear_cross_entropy

PACKED_SEQUENCES = "find_packed_sequence_indices"  # transformers' function; it looks for positions that begin again


class CausalLoss:
    """The loss of a model; labels are not shifted.

    Attributes:
        model: a causal language model of transformers.
        chunked: whether the head is applied in chunks.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.decoder, self.head = _decoder_and_head(model)
        self.chunked = self.decoder is not None and self._chunks_give_the_models_loss()

    def __call__(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None, *, num_trained: int | None = None
    ) -> Tensor:
        """Sum the loss over the labels that count.

        Args:
            input_ids: (batch, tokens).
            labels: like `input_ids`; -100 where a token does not count.
            position_ids: like `input_ids`, where several rows share a sequence; each begins at 0, and its first label
                is -100.
            num_trained: how many of labels[:, 1:] count; without it a GPU is waited for to count them.

        Returns:
            A scalar in nats, fp32.
        """
        targets = labels[:, 1:].reshape(-1)
        outputs = self.outputs(input_ids, position_ids)[:, :-1]
        if not self.chunked:
            return F.cross_entropy(outputs.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
        return self._chunked_loss(outputs.flatten(0, 1), targets, num_trained)

    def _chunked_loss(self, hidden: Tensor, targets: Tensor, count: int | None = None) -> Tensor:
        head = self.head
        return linear_cross_entropy(
            hidden, head.weight, targets, count=count, bias=head.bias, scale=self.scale, softcap=self.softcap
        )

    def outputs(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """What the loss is computed from: hidden states where the head is applied in chunks, else logits."""
        return self._hidden(input_ids, position_ids) if self.chunked else self._logits(input_ids, position_ids)

    def _hidden(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        with _positions(position_ids) as positions:
            hidden: Tensor = self.decoder(input_ids=input_ids, use_cache=False, **positions)[0]
        return hidden.to(self.head.weight.dtype)  # some keep fp32 between their 16-bit blocks (Mamba)

    def _logits(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        with _positions(position_ids) as positions:
            logits: Tensor = self.model(input_ids=input_ids, use_cache=False, **positions).logits
        return logits

    @torch.no_grad()
    def isolates_packed_rows(self) -> bool:
        """Whether a row that is packed behind another gives what it gives alone, whatever the other contains.

        Tried on short rows in evaluation mode, so the answer is of this model and not of a list of names.
        """
        parameter = next(self.model.parameters())
        first, other, row = torch.arange(3 * 6, device=parameter.device).mul_(5).remainder_(17).add_(1).view(3, 1, 6)
        positions = torch.arange(6, device=parameter.device).repeat(2)[None]
        with evaluation_mode(self.model):
            try:
                alone = self.outputs(row).float()
                packed, again = (
                    self.outputs(torch.cat([before, row], 1), positions)[:, 6:].float() for before in (first, other)
                )
            except TypeError:  # a model that takes no positions
                return False
        fp32 = parameter.dtype == torch.float32
        same = (packed - alone).norm() <= (1e-4 if fp32 else 3e-2) * alone.norm()
        independent = (packed - again).norm() <= (1e-5 if fp32 else 1e-3) * alone.norm()
        return bool(same and independent)

    @torch.no_grad()
    def _chunks_give_the_models_loss(self) -> bool:
        """Whether the chunked loss is that of the model's own logits, tried on eight tokens in evaluation mode."""
        vocabulary = self.head.weight.shape[0]
        probe = torch.arange(8, device=self.head.weight.device).mul_(7).remainder_(vocabulary)[None]
        with evaluation_mode(self.model):
            logits = self._logits(probe)[0, :-1].float()
            expected = F.cross_entropy(logits, probe[0, 1:], reduction="sum")
            chunked = self._chunked_loss(self._hidden(probe)[0, :-1], probe[0, 1:])
        # Rounding of the logits to 16 bits before the softmax is the only difference that is allowed.
        tolerance = 1e-5 if self.head.weight.dtype == torch.float32 else 2e-2
        return bool((expected - chunked).abs() <= tolerance * expected.abs()) or not bool(torch.isfinite(expected))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Let `model` compute without dropout inside; its mode is set back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _positions(position_ids: Tensor | None) -> Iterator[dict[str, Tensor]]:
    """The keyword argument for positions, where some are given.

    Without any each row is one sequence. transformers searches the positions that it made itself for several sequences
    all the same, for which every forward waits for a GPU; inside, that search is replaced by its answer.
    """
    from transformers import masking_utils

    if position_ids is not None or not hasattr(masking_utils, PACKED_SEQUENCES):
        yield {} if position_ids is None else {"position_ids": position_ids}
        return
    search = getattr(masking_utils, PACKED_SEQUENCES)
    setattr(masking_utils, PACKED_SEQUENCES, lambda position_ids: None)
    try:
        yield {}
    finally:
        setattr(masking_utils, PACKED_SEQUENCES, search)


def _decoder_and_head(model: Any) -> tuple[Any, Any]:
    """(decoder, linear head), or (None, head) where the model does not expose them."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model:
        decoder = getattr(model, getattr(model, "base_model_prefix", ""), None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return (decoder if isinstance(head, nn.Linear) else None), head

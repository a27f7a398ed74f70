"""Summed next-token loss of a causal language model without its logits as a whole.

The decoder gives hidden states, the head is applied in chunks. That shortcut is right only if the model's own forward
is head(decoder(x)) up to a scale and a soft cap, so it is compared with the model's own logits once, on a few tokens;
a model that does more gets its own logits and one whole cross-entropy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from owlore.kernels.cross_entropy import IGNORED, linear_cross_entropy

LOOKS = "find_packed_sequence_indices"  # transformers' function for positions that begin again inside a row


class CausalLoss:
    """Calls as loss(input_ids, labels) -> fp32 scalar, summed over labels that count; labels are not shifted.

    position_ids: given where several rows share a sequence; each begins at 0 again, and its first label is -100.
    num_trained: how many of labels[:, 1:] count, where the caller knows it; on a GPU nobody then waits to find out.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.decoder, self.head = _parts(model)
        self.chunked = self.decoder is not None and self._agrees()

    def __call__(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None, *, num_trained: int | None = None
    ) -> Tensor:
        targets = labels[:, 1:].reshape(-1)
        outputs = self.outputs(input_ids, position_ids)[:, :-1]
        if not self.chunked:
            return F.cross_entropy(outputs.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
        return linear_cross_entropy(
            outputs.flatten(0, 1),
            self.head.weight,
            targets,
            count=num_trained,
            bias=self.head.bias,
            scale=self.scale,
            softcap=self.softcap,
        )

    def outputs(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """What the loss is made of: hidden states for the head or, where that is no shortcut, logits."""
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
    def keeps_rows_apart(self) -> bool:
        """Does a row packed behind another give what it gives alone, whatever the other one says?

        Tried on two short rows in evaluation mode, so that it holds for the model at hand and not for a list of names.
        """
        outputs = self._hidden if self.chunked else self._logits
        parameter = next(self.model.parameters())
        first, other, row = torch.arange(3 * 6, device=parameter.device).mul_(5).remainder_(17).add_(1).view(3, 1, 6)
        positions = torch.arange(6, device=parameter.device).repeat(2)[None]
        training = self.model.training
        self.model.eval()
        try:
            alone = outputs(row).float()
            packed, again = (
                outputs(torch.cat([before, row], 1), positions)[:, 6:].float() for before in (first, other)
            )
        except TypeError:  # a model that takes no positions
            return False
        finally:
            self.model.train(training)
        exact = parameter.dtype == torch.float32
        same = (packed - alone).norm() <= (1e-4 if exact else 3e-2) * alone.norm()
        blind = (packed - again).norm() <= (1e-5 if exact else 1e-3) * alone.norm()
        return bool(same and blind)

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Is the chunked loss the model's own? Checked on eight tokens in evaluation mode."""
        device = self.head.weight.device
        vocabulary = self.head.weight.shape[0]
        probe = torch.arange(8, device=device).mul_(7).remainder_(vocabulary)[None]
        training = self.model.training
        self.model.eval()
        try:
            logits = self._logits(probe)[0, :-1].float()
            own = F.cross_entropy(logits, probe[0, 1:], reduction="sum")
            hidden = self._hidden(probe)[0, :-1]
            ours = linear_cross_entropy(
                hidden, self.head.weight, probe[0, 1:], bias=self.head.bias, scale=self.scale, softcap=self.softcap
            )
        finally:
            self.model.train(training)
        # Rounding of the logits to 16 bits before the softmax is the only difference that is allowed.
        tolerance = 1e-5 if self.head.weight.dtype == torch.float32 else 2e-2
        return bool((own - ours).abs() <= tolerance * own.abs()) or not bool(torch.isfinite(own))


@contextmanager
def _positions(position_ids: Tensor | None) -> Iterator[dict[str, Tensor]]:
    """The argument that tells positions, where some are given.

    Without any each row is one sequence. transformers does not know that and looks at the positions that it made
    itself, for which a GPU is waited for in every forward; inside it is told.
    """
    from transformers import masking_utils

    if position_ids is not None or not hasattr(masking_utils, LOOKS):
        yield {} if position_ids is None else {"position_ids": position_ids}
        return
    own = getattr(masking_utils, LOOKS)
    setattr(masking_utils, LOOKS, lambda position_ids: None)
    try:
        yield {}
    finally:
        setattr(masking_utils, LOOKS, own)


def _parts(model: Any) -> tuple[Any, Any]:
    """(decoder, linear head), or (None, head) where the model does not expose them."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model:
        decoder = getattr(model, getattr(model, "base_model_prefix", ""), None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return (decoder if isinstance(head, nn.Linear) else None), head

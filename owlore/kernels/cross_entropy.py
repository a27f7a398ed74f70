"""Cross-entropy of a linear head in chunks of tokens: the logits never exist as a whole.

For hidden states H (N x d) and head weight W (V x d): z = scale * H W^T (+ b), loss = sum_i logsumexp(z_i) - z_i[y_i].
The gradient dz = softmax(z) - onehot(y) is turned into dH = scale * dz W (and dW) while its chunk is alive, so backward
only multiplies by the incoming scalar. Rows whose label is -100 are dropped before anything is multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label that torch's cross-entropy leaves out
CHUNK_ELEMENTS = 1 << 24  # logits alive at once: 64 MiB in fp32


def chunk_rows(vocabulary: int) -> int:
    """Tokens a chunk holds."""
    return max(16, CHUNK_ELEMENTS // vocabulary)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    count: int | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Summed negative log-likelihood (fp32 scalar) of `labels` (N, already shifted) under the head.

    count: how many labels are not -100, where that is known; without it a GPU has to be asked, and waited for.
    `softcap` c applies c * tanh(z / c) to the logits (Gemma 2). Divide by the number of labels that count.
    """
    if count != len(labels):
        kept = _kept(labels, count)
        hidden, labels = hidden.index_select(0, kept), labels.index_select(0, kept)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, scale, softcap)
    return loss


def _kept(labels: Tensor, count: int | None) -> Tensor:
    """Positions of the labels that count, in order."""
    ignored = labels == IGNORED
    if count is None:
        return torch.nonzero(~ignored).squeeze(1)
    return torch.argsort(ignored.to(torch.uint8), stable=True)[:count]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = chunk_rows(weight.shape[0])
        room = hidden.new_empty(min(size, len(labels)), weight.shape[0])  # of one chunk's logits, used again
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            logits = torch.mm(hidden[rows], weight.T, out=room[: len(labels[rows])]).float()
            chunk_loss, dz = _chunk(logits, bias, labels[rows], scale, softcap, any(ctx.needs_input_grad))
            loss += chunk_loss
            if dz is None:
                continue
            if grad_bias is not None:
                grad_bias += dz.sum(0)
            dz = dz if scale == 1.0 else dz.mul_(scale)
            dz = dz if dz.dtype == weight.dtype else room[: len(dz)].copy_(dz)
            if grad_hidden is not None:
                torch.mm(dz, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, dz.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
        return loss

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors  # scaled in place: one backward a forward
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(incoming.to(grad_hidden.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(incoming).to(ctx.dtypes[0])
        if grad_bias is not None:
            grad_bias = grad_bias.mul_(incoming).to(ctx.dtypes[1])
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; where the types agree no second tensor of that size (the whole head's) is made."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _chunk(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss of one chunk and, if asked for, dloss/d(scale * H W^T + b), both fp32; `logits` (fp32 H W^T) is used up."""
    if scale != 1.0:
        logits *= scale
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    slope = 1 - (logits / softcap).square_() if softcap is not None and need_gradient else None
    # One exponential, in place: the chunk is the only tensor of its size.
    top = logits.amax(dim=-1, keepdim=True)
    chosen = logits.gather(1, labels[:, None]) - top
    exponentials = logits.sub_(top).exp_()
    total = exponentials.sum(dim=-1, keepdim=True)
    loss = (total.log() - chosen).sum()
    if not need_gradient:
        return loss, None
    dz = exponentials.div_(total)
    dz.scatter_add_(1, labels[:, None], torch.full_like(chosen, -1.0))
    return loss, dz if slope is None else dz.mul_(slope)

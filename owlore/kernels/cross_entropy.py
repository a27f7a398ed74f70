"""Cross-entropy of a linear head in chunks of tokens, without the logits of all tokens at once.

For hidden states H (N x d) and head weight W (V x d): z = scale * H W^T (+ b), loss = sum_i logsumexp(z_i) - z_i[y_i].
The forward turns the gradient dz = softmax(z) - onehot(y) of each chunk into dH = scale * dz W (and dW) at once, so
backward only multiplies by the incoming scalar. Rows whose label is -100 are dropped before any product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label that torch's cross-entropy leaves out
CHUNK_ELEMENTS = 1 << 24  # logits of one chunk: 64 MiB in fp32


def chunk_rows(vocabulary: int) -> int:
    """Number of tokens in a chunk."""
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
    """Summed negative log-likelihood of the labels under the head; divide it by their number for the mean.

    Args:
        hidden: Hidden states H, (N, d).
        weight: Weight of the head W, (V, d).
        labels: Labels, (N,) int64, already shifted; -100 leaves a row out.
        count: How many labels are not -100, if known. Without it they are counted, for which a GPU has to be
            synchronised.
        bias: Bias of the head, (V,).
        scale: Factor of the logits.
        softcap: c of c * tanh(z / c), which is applied to the logits (Gemma 2); None applies nothing.

    Returns:
        The sum over all labels but -100, an fp32 scalar.
    """
    if count != len(labels):
        kept = _kept(labels, count)
        hidden, labels = hidden.index_select(0, kept), labels.index_select(0, kept)
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, scale, softcap)


def _kept(labels: Tensor, count: int | None) -> Tensor:
    """Positions of the labels that are not -100, ascending."""
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
        buffer = hidden.new_empty(min(size, len(labels)), weight.shape[0])  # one chunk's logits; reused
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            logits = torch.mm(hidden[rows], weight.T, out=buffer[: len(labels[rows])]).float()
            chunk_loss, dz = _chunk(logits, bias, labels[rows], scale, softcap, any(ctx.needs_input_grad))
            loss += chunk_loss
            if dz is None:
                continue
            if grad_bias is not None:
                grad_bias += dz.sum(0)
            dz = dz if scale == 1.0 else dz.mul_(scale)
            dz = dz if dz.dtype == weight.dtype else buffer[: len(dz)].copy_(dz)
            if grad_hidden is not None:
                torch.mm(dz, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, dz.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
        return loss

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors  # scaled in place: only one backward per forward
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(incoming.to(grad_hidden.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(incoming).to(ctx.dtypes[0])
        if grad_bias is not None:
            grad_bias = grad_bias.mul_(incoming).to(ctx.dtypes[1])
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; with equal dtypes no second tensor of the head's size is made."""
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
    """Loss of one chunk and, if needed, dloss/d(scale * H W^T + b), both fp32; `logits` (fp32 H W^T) is overwritten."""
    if scale != 1.0:
        logits *= scale
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    slope = 1 - (logits / softcap).square_() if softcap is not None and need_gradient else None
    # The exponential is taken once and in place, so that the chunk is the only tensor of its size.
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

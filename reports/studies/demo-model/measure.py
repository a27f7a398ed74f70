"""What the model card states: held-out perplexity, and layer outliers (LOD) block by block.

python measure.py htsr/assets/demo htsr/assets/calibration.txt
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WINDOW = 512


def stream(text: str, tokenizer: Any) -> Tensor:
    """Token ids (n,) of all documents, `<s> document </s>` each, joined. Documents are parted by an empty line."""
    documents = [d.strip("\n") for d in text.split("\n\n") if d.strip()]
    pieces = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    joined = [t for ids in pieces for t in (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id)]
    return torch.tensor(joined, dtype=torch.long)


@torch.no_grad()
def perplexity(model: nn.Module, text: str, tokenizer: Any) -> tuple[float, float, int]:
    """Perplexity per token, bits per byte of the text, and the number of predicted tokens.

    The stream is cut into consecutive windows of 512 tokens; every token but a window's first is predicted from the
    tokens of its own window, so the figure is a little worse than a sliding window would give.
    """
    ids = stream(text, tokenizer)
    model.eval()
    loss, count = 0.0, 0
    for window in ids.split(WINDOW):
        if len(window) < 2:
            continue
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        loss += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    nats = loss / count
    bits_per_byte = nats / 0.6931471805599453 * len(ids) / len(text.encode())
    return float(torch.tensor(nats, dtype=torch.float64).exp()), bits_per_byte, count


@torch.no_grad()
def block_outliers(model: nn.Module, windows: Tensor, tau: float = 13.0) -> list[tuple[float, float]]:
    """For every block the LOD and the weight-only LOD, both in percent: the share of all entries of its linear maps
    with |W_ij| ||X_j||_2 (or |W_ij| alone) above tau times the mean over the block. windows: (n, 512) token ids.

    Reference: Yin et al. 2024 (OWL), layerwise outlier distribution.
    """
    squares: dict[nn.Module, Tensor] = {}

    def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double().flatten(0, -2)
        squares[module] = squares.get(module, torch.zeros(x.shape[1], dtype=torch.float64)) + x.square().sum(0)

    blocks = model.model.layers  # type: ignore[union-attr]
    maps = [[m for m in block.modules() if isinstance(m, nn.Linear)] for block in blocks]  # type: ignore[union-attr]
    handles = [m.register_forward_pre_hook(collect) for block in maps for m in block]
    model.eval()
    for window in windows:
        model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    found = []
    for block in maps:
        by_weight = torch.cat([m.weight.double().abs().flatten() for m in block])
        scaled = torch.cat([(m.weight.double().abs() * squares[m].sqrt()).flatten() for m in block])
        found.append(tuple(float((s > tau * s.mean()).double().mean()) * 100 for s in (scaled, by_weight)))
    return found  # type: ignore[return-value]


def calibration_windows(text: str, tokenizer: Any, count: int = 32) -> Tensor:
    """`count` windows (count, 512), evenly spread over the text, without special tokens."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


def main(directory: Path, calibration: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ppl, bits, count = perplexity(model, (directory / "heldout.txt").read_text(encoding="utf-8"), tokenizer)
    print(f"held-out perplexity {ppl:.4f} per token ({bits:.4f} bits per byte, {count:,} tokens)")
    windows = calibration_windows(calibration.read_text(encoding="utf-8"), tokenizer)
    for tau in (5.0, 13.0):
        lod = block_outliers(model, windows, tau)
        print(f"tau {tau:g}: LOD % by block        ", " ".join(f"{a:.4f}" for a, _ in lod))
        print(f"tau {tau:g}: weight-only % by block", " ".join(f"{b:.4f}" for _, b in lod))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

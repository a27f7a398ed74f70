"""Trains the embedded demo model: a Llama of 8 blocks, 128 wide, on 62 of the 66 books of the King James text.

    OMP_NUM_THREADS=1 python train_model.py build/demo-model

Plain PyTorch: AdamW, warm-up and cosine, one seed. Three quarters of the steps see windows of 256 tokens, the last
quarter windows of 512 (half as many, so that a step always costs the same number of tokens): cheap first, and the
positions up to 512 are trained as well. Writes `model/`, `log.csv` and `settings.json` below `build/demo-model/`.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import WINDOW, perplexity, stream
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 4000
    tokens_per_step: int = 2048
    lr: float = 1e-2  # high on purpose: see README.md, choice of settings
    final_lr: float = 0.03  # share of lr that the cosine ends at
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.3  # on matrices, the embedding included; none on norm gains
    clip: float = 1.0
    short_share: float = 0.75  # of the steps, with windows of half the length
    eval_every: int = 250
    init: float = 0.02
    seed: int = 0


def new_model(tokenizer: Any, s: Settings) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        initializer_range=s.init,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, s: Settings) -> float:
    """Linear warm-up, then a cosine from lr to final_lr * lr at the last step. Steps count from 1."""
    if step <= s.warmup:
        return s.lr * step / s.warmup
    angle = math.pi * (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.lr * (s.final_lr + (1 - s.final_lr) * 0.5 * (1 + math.cos(angle)))


def batch(ids: Tensor, step: int, s: Settings, generator: torch.Generator) -> Tensor:
    """(sequences, length + 1) token ids at random places of the stream (n,)."""
    length = WINDOW // 2 if step <= s.short_share * s.steps else WINDOW
    starts = torch.randint(len(ids) - length, (s.tokens_per_step // length,), generator=generator)
    return torch.stack([ids[a : a + length + 1] for a in starts.tolist()])


def groups(model: nn.Module, s: Settings) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": s.weight_decay}, {"params": gains, "weight_decay": 0.0}]


def train(work: Path, s: Settings) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    ids = stream((work / "train.txt").read_text(encoding="utf-8"), tokenizer)
    heldout = (work / "heldout.txt").read_text(encoding="utf-8")
    torch.manual_seed(s.seed)
    generator = torch.Generator().manual_seed(s.seed)
    model = new_model(tokenizer, s)
    optimizer = torch.optim.AdamW(groups(model, s), lr=s.lr, betas=s.betas)
    print(f"{model.num_parameters():,} parameters, {len(ids):,} training tokens, {asdict(s)}", flush=True)
    (work / "settings.json").write_text(json.dumps({**asdict(s), "training_tokens": len(ids)}))
    start, window_loss = time.perf_counter(), 0.0
    with (work / "log.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "tokens", "lr", "train_loss", "heldout_perplexity", "seconds"])
        for step in range(1, s.steps + 1):
            rate = learning_rate(step, s)
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            tokens = batch(ids, step, s, generator)
            logits = model(input_ids=tokens[:, :-1]).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            window_loss += loss.item()
            if step % s.eval_every == 0 or step == s.steps:
                ppl, _, _ = perplexity(model, heldout, tokenizer)
                mean = window_loss / (step % s.eval_every or s.eval_every)
                seconds = time.perf_counter() - start
                log.writerow(
                    [step, step * s.tokens_per_step, f"{rate:.3e}", f"{mean:.4f}", f"{ppl:.4f}", f"{seconds:.0f}"]
                )
                file.flush()
                print(f"step {step} train loss {mean:.3f} held-out perplexity {ppl:.2f} {seconds:.0f} s", flush=True)
                window_loss = 0.0
                save(model, tokenizer, work)


def save(model: LlamaForCausalLM, tokenizer: Any, work: Path) -> None:
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path, nargs="?", default=Path("build/demo-model"))
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--lr", type=float, default=Settings.lr)
    parser.add_argument("--weight-decay", type=float, default=Settings.weight_decay)
    options = parser.parse_args()
    train(options.work, Settings(steps=options.steps, lr=options.lr, weight_decay=options.weight_decay))


if __name__ == "__main__":
    main()

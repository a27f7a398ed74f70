"""What the arms of this benchmark share: tokens, draws, the model, and the resident set of the process."""

from __future__ import annotations

import argparse
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

# Outlier share of LLaMA-2-7B's 32 blocks in percent, tau 13 (the table published with OwLore, three digits).
STEEP = (
    .268, .295, .127, .114, .0988, .0884, .0878, .0838, .0801, .0722, .0707, .0696, .0630, .0591, .0552, .0537,
    .0468, .0392, .0336, .0340, .0316, .0279, .0278, .0229, .0254, .0209, .0242, .0182, .0184, .0209, .0241, .0825,
)  # fmt: skip


def loaded(args: argparse.Namespace) -> Any:
    """The model in fp32 with every page of its weights in memory: a file that is only mapped does not count as
    resident, and would be charged to the first step."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
    for parameter in model.parameters():
        parameter.detach().sum()
    with torch.no_grad():  # and the libraries' own pages
        model(input_ids=torch.arange(8)[None] + 4)
    return model


def token_batches(args: argparse.Namespace) -> Any:
    """(steps, batch, tokens) ids of the packaged public-domain text in reading order; every arm sees the same."""
    import torch
    from transformers import AutoTokenizer

    text = (files("htsr") / "assets/calibration.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(args.model)(text).input_ids
    steps = len(ids) // (args.batch * args.tokens)
    return torch.tensor(ids[: steps * args.batch * args.tokens]).view(steps, args.batch, args.tokens)


def even_pairs(blocks: int) -> list[tuple[int, ...]]:
    """Pairs in which every block comes once: the first shuffled cycle whose mean depth is what uniform draws of two
    have, L + 1 - (L + 1) / 3."""
    from owlore.sampling import draw_shuffled

    uniform = np.full(blocks, 2 / blocks)
    wanted = round((blocks + 1) * (1 - 1 / 3) * (blocks // 2))
    for seed in range(10_000):
        pairs = [draw_shuffled(uniform, seed, period) for period in range(blocks // 2)]
        if sum(blocks - min(pair) for pair in pairs) == wanted:
            return pairs
    raise ValueError("no cycle of the wanted depth")


def every_third(blocks: int) -> list[int]:
    """Blocks 1, 4, 7 ...: their mean depth is that of all."""
    return list(range(1, blocks, 3))


def steep_pairs(blocks: int) -> list[tuple[int, ...]]:
    """As many pairs drawn by a table as steep as LLaMA-2-7B's, of the seed whose mean depth is nearest to the mean
    over 2,000 periods."""
    from owlore.sampling import draw, inclusion

    scores = np.interp(np.linspace(0, len(STEEP) - 1, blocks), np.arange(len(STEEP)), STEEP)
    pi = inclusion(scores, 2)
    expected = np.mean([blocks - min(draw(pi, 0, period)) for period in range(2000)])
    cycles = ([draw(pi, seed, period) for period in range(blocks // 2)] for seed in range(1, 200))
    return min(cycles, key=lambda pairs: abs(np.mean([blocks - min(pair) for pair in pairs]) - expected))


class Clock:
    """Wall and processor seconds of steps."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def start(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        wall, cpu = self._started
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def after_warm_up(self) -> dict[str, Any]:
        return {"seconds": self.wall[1:], "cpu_seconds": self.cpu[1:]}


def resident() -> int:
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def reset_peak() -> None:
    """Linux: start the high-water mark of the resident set anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) * 1024

"""Random numbers as functions of (seed, purpose, index), so that no generator state has to be saved."""

from __future__ import annotations

import hashlib

import torch

Index = int | str


def seed_for(seed: int, purpose: str, *index: Index) -> int:
    """A 63-bit seed for this purpose and index, hashed so that neighbouring seeds and indexes are independent.

    Args:
        seed: Seed of the run.
        purpose: Name of the use, so that two uses of one seed are independent.
        *index: Numbers or names that tell the streams of one purpose apart, such as the step.
    """
    text = "\x1f".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator_for(seed: int, purpose: str, *index: Index, device: torch.device | str = "cpu") -> torch.Generator:
    """A new torch generator seeded with `seed_for(seed, purpose, *index)`."""
    return torch.Generator(device=device).manual_seed(seed_for(seed, purpose, *index))

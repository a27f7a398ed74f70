"""Counter-based randomness: every random number is a function of (seed, purpose, index), so nothing has to be saved."""

from __future__ import annotations

import hashlib

import torch

Index = int | str


def seed_for(seed: int, purpose: str, *index: Index) -> int:
    """A 63-bit seed that belongs to this purpose and index alone.

    Hashed rather than added, so that neighbouring seeds and indexes share nothing.
    """
    text = "\x1f".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator_for(seed: int, purpose: str, *index: Index, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator at the start of the stream of `seed_for`."""
    return torch.Generator(device=device).manual_seed(seed_for(seed, purpose, *index))

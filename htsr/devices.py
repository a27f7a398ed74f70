"""From the name of a device to one that this machine has."""

from __future__ import annotations

from htsr.errors import UsageError


def pick_device(device: str) -> str:
    """`auto` is the first CUDA device when there is one, else the CPU. Raises UsageError for a device that is not."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device: got {device!r}, expected auto, cpu or a CUDA device that this machine has"
        ) from error
    return device

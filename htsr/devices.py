"""Which device a name stands for."""

from __future__ import annotations

from htsr.errors import UsageError


def pick_device(device: str) -> str:
    """Choose the device that the computation runs on.

    Args:
        device: `auto` (the first CUDA device when there is one, else the CPU), `cpu` or `cuda[:N]`.

    Raises:
        UsageError: this machine has no such device.
    """
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

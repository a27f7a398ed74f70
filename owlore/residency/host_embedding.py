"""An input embedding that stays in host memory: only the rows that a batch looks up travel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from owlore.patches import PatchStack


class HostEmbedding:
    """Owns an embedding's forward: looks rows up on the host and gives them to the device.

    The ids of a batch are on the host before they are on the device; `knows` hands them over, so that looking them up
    waits for nothing.
    """

    def __init__(self, module: nn.Module, device: torch.device, patches: PatchStack | None = None) -> None:
        self._module, self._device, self._forward = module, device, module.forward
        (PatchStack() if patches is None else patches).replace_forward(module, self._look_up)
        self._ids: dict[int, Tensor] = {}
        self._idle = False
        module.to("cpu")

    def _look_up(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        host = self._ids.get(ids.data_ptr())
        host = ids.cpu() if host is None or host.numel() != ids.numel() else host.view(ids.shape)
        if self._idle:
            like = self._forward(host.flatten()[:1], *args, **kwargs)
            return torch.zeros((), dtype=like.dtype, device=self._device).expand(*ids.shape, like.shape[-1])
        rows: Tensor = self._forward(host, *args, **kwargs)
        if self._device.type != "cuda":
            return rows.to(self._device)
        return rows.pin_memory().to(self._device, non_blocking=True)

    def knows(self, ids: Tensor, host: Tensor) -> None:
        """`host` are the same ids as `ids`."""
        self._ids[ids.data_ptr()] = host

    def forget(self) -> None:
        self._ids.clear()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Inside, nobody reads what is looked up: zeros of the right shape are given."""
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    def num_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(p.numel() * p.element_size() for p in self._module.parameters())

"""An input embedding that stays in host memory: only the rows that a batch looks up are copied to the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from owlore.patches import PatchStack


class HostEmbedding:
    """Replaces an embedding's forward: rows are looked up on the host and copied to the device.

    The ids of a batch are on the host before they are on the device. `set_host_ids` hands them over, so that looking
    them up does not wait for the device.

    Args:
        module: the embedding; it is moved to the CPU.
        device: where the rows are needed.
        patches: the stack on which the forward is replaced.
    """

    def __init__(self, module: nn.Module, device: torch.device, patches: PatchStack | None = None) -> None:
        self._module, self._device, self._forward = module, device, module.forward
        (PatchStack() if patches is None else patches).replace_forward(module, self._look_up)
        self._host_ids: dict[int, Tensor] = {}  # by the address of the ids on the device
        self._gives_zeros = False
        module.to("cpu")

    def _look_up(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        host = self._host_ids.get(ids.data_ptr())
        host = ids.cpu() if host is None or host.numel() != ids.numel() else host.view(ids.shape)
        if self._gives_zeros:
            like = self._forward(host.flatten()[:1], *args, **kwargs)
            return torch.zeros((), dtype=like.dtype, device=self._device).expand(*ids.shape, like.shape[-1])
        rows: Tensor = self._forward(host, *args, **kwargs)
        if self._device.type != "cuda":
            return rows.to(self._device)
        return rows.pin_memory().to(self._device, non_blocking=True)

    def set_host_ids(self, ids: Tensor, host: Tensor) -> None:
        """Tell that `host` has the same ids as `ids`, which are on the device."""
        self._host_ids[ids.data_ptr()] = host

    def clear_host_ids(self) -> None:
        """Forget all ids; needed before their device memory is used again."""
        self._host_ids.clear()

    @contextmanager
    def give_zeros(self) -> Iterator[None]:
        """Inside, give zeros of the right shape, for a forward that does not use what is looked up."""
        self._gives_zeros = True
        try:
            yield
        finally:
            self._gives_zeros = False

    def num_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(p.numel() * p.element_size() for p in self._module.parameters())

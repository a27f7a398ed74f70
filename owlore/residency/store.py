"""The frozen blocks as blobs: one a block, on the host (page-locked where possible) or on the device.

A store of exact blobs holds the weights themselves; one of quantised blobs is made from the exact weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from owlore.residency.blob_layout import BlobLayout
from owlore.residency.pinned import HostBlob, Pin, locked_bytes


class Store:
    """The blobs of all blocks.

    Args:
        layouts: the layout of each block.
        device: where blocks compute.
        resident: blocks whose blob is on `device`; the others are on the host.
        pin: allocates host memory.
    """

    def __init__(
        self, layouts: Sequence[BlobLayout], *, device: torch.device, resident: Collection[int], pin: Pin
    ) -> None:
        self.layouts, self.device, self.resident, self._pin = tuple(layouts), device, frozenset(resident), pin
        self.blobs: dict[int, HostBlob] = {}

    @property
    def exact(self) -> bool:
        """Whether the blobs hold the weights' own bits."""
        return all(layout.exact for layout in self.layouts)

    @property
    def streamed(self) -> frozenset[int]:
        """Blocks that have to be copied to be read."""
        return frozenset(range(len(self.layouts))) - self.resident

    def fill(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Pack exact weights, by name inside the block, into the block's blob."""
        if block not in self.blobs:
            self.blobs[block] = self._allocate(block)
        self.layouts[block].fill(self.blobs[block].tensor, tensors, self.device)

    def drop(self, block: int) -> None:
        """Free the block's blob; the next `fill` allocates one again."""
        del self.blobs[block]

    def views(self, block: int) -> dict[str, dict[str, Tensor]]:
        """Views of the block's blob: weight -> field -> view."""
        return self.layouts[block].views(self.blobs[block].tensor)

    def _allocate(self, block: int) -> HostBlob:
        size = self.layouts[block].num_bytes
        if block in self.resident:
            return HostBlob(torch.empty(size, dtype=torch.uint8, device=self.device), False)
        return self._pin(size)

    def host_bytes(self) -> int:
        """Bytes of the blobs on the host."""
        return sum(blob.tensor.numel() for block, blob in self.blobs.items() if block not in self.resident)

    def device_bytes(self) -> int:
        """Bytes of the blobs on the device."""
        return sum(self.blobs[block].tensor.numel() for block in self.resident & self.blobs.keys())

    def pinned_bytes(self) -> int:
        """Bytes of page-locked memory."""
        return sum(locked_bytes(blob.tensor.numel()) for blob in self.blobs.values() if blob.pinned)

    def num_pageable(self) -> int:
        """Number of blobs on the host that could not be page-locked."""
        return sum(not self.blobs[block].pinned for block in self.streamed & self.blobs.keys())

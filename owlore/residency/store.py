"""The frozen blocks as blobs: one a block, on the host (page-locked where possible) or on the device.

A store of exact blobs is where the weights live. One of quantised blobs can be made again from the exact weights; it
can be kept in a file, which names the weights and the format it was made from and is refused for any other.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htsr.errors import BadInput
from owlore.residency.blob_layout import BlobLayout
from owlore.residency.pinned import HostBlob, Pin, locked_bytes

SCHEMA = "owlore-store/1"


class Store:
    """Blobs of all blocks. resident: blocks whose blob lies on `device`; the others lie on the host."""

    def __init__(
        self, layouts: Sequence[BlobLayout], *, device: torch.device, resident: Collection[int], pin: Pin
    ) -> None:
        self.layouts, self.device, self.resident, self._pin = tuple(layouts), device, frozenset(resident), pin
        self.blobs: dict[int, HostBlob] = {}

    @property
    def exact(self) -> bool:
        return all(layout.exact for layout in self.layouts)

    @property
    def streamed(self) -> frozenset[int]:
        """Blocks that have to be copied to be read."""
        return frozenset(range(len(self.layouts))) - self.resident

    def fill(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Make the block's blob stand for these exact weights (by name inside the block)."""
        if block not in self.blobs:
            self.blobs[block] = self._allocate(block)
        self.layouts[block].fill(self.blobs[block].tensor, tensors, self.device)

    def drop(self, block: int) -> None:
        """Free the block's blob; the next `fill` makes one again."""
        del self.blobs[block]

    def views(self, block: int) -> dict[str, dict[str, Tensor]]:
        """weight -> field -> view of the block's blob."""
        return self.layouts[block].views(self.blobs[block].tensor)

    def _allocate(self, block: int) -> HostBlob:
        size = self.layouts[block].num_bytes
        if block in self.resident:
            return HostBlob(torch.empty(size, dtype=torch.uint8, device=self.device), False)
        return self._pin(size)

    # -- what is held ------------------------------------------------------------------------------------------------

    def host_bytes(self) -> int:
        return sum(blob.tensor.numel() for block, blob in self.blobs.items() if block not in self.resident)

    def device_bytes(self) -> int:
        return sum(self.blobs[block].tensor.numel() for block in self.resident & self.blobs.keys())

    def locked(self) -> int:
        """Bytes of page-locked memory."""
        return sum(locked_bytes(blob.tensor.numel()) for blob in self.blobs.values() if blob.pinned)

    def refused(self) -> int:
        """Blobs on the host that could not be locked."""
        return sum(not self.blobs[block].pinned for block in self.streamed & self.blobs.keys())

    # -- a file ------------------------------------------------------------------------------------------------------

    def describe(self, weights_sha256: str) -> dict[str, object]:
        """What a store file says about itself: of which weights it was made, and how each block lies in it."""
        blocks = [
            [[w.name, list(w.shape), str(w.dtype), w.form.name] for w in layout.weights] for layout in self.layouts
        ]
        return {"schema": SCHEMA, "weights_sha256": weights_sha256, "blocks": blocks}

    def save(self, path: Path, weights_sha256: str) -> None:
        """Write all blobs; the file is either complete or not there."""
        header = json.dumps(self.describe(weights_sha256)).encode()
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for block in range(len(self.layouts)):
                file.write(self.blobs[block].tensor.cpu().numpy().tobytes())
        partial.replace(path)

    def read(self, path: Path, weights_sha256: str) -> None:
        """Take the blobs from a file.

        Raises: BadInput for a file made from other weights, another format or another model.
        """
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(min(length, 1 << 26)))
            except ValueError as error:
                raise BadInput(f"{path} is not a store of frozen blocks; remove it") from error
            expected = json.loads(json.dumps(self.describe(weights_sha256)))
            for key in expected:
                got = header.get(key) if isinstance(header, dict) else None
                if got != expected[key]:
                    shown = f": got {got!r}, expected {expected[key]!r}" if key != "blocks" else ""
                    raise BadInput(f"{path} was made from another {_NAMES[key]}{shown}; remove it, it is made anew")
            for block, layout in enumerate(self.layouts):
                self.blobs[block] = self._allocate(block)
                buffer = torch.empty(layout.num_bytes, dtype=torch.uint8)
                into: Any = buffer.numpy()
                if file.readinto(into) != layout.num_bytes:
                    raise BadInput(f"{path} ends inside block {block}; remove it, it is made anew")
                self.blobs[block].tensor.copy_(buffer)


_NAMES = {"schema": "version", "weights_sha256": "model's weights", "blocks": "model or format"}

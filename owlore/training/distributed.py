"""Several processes, one run: each works on its share of a step's micro-batches, and all make the same update.

Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT in the environment), on one machine or on
several that share a file system. A step sees batch x accum x processes sequences. What is exchanged is what the
optimizer gathered: of a projected matrix the r-dimensional sum, its full gradient only in a step that looks for a new
basis. Draws, data order, learning rate and random numbers are pure functions of seed and step, so nothing else has to
be sent; that the ranks agree is checked by hashes. Rank 0 alone writes, and says what is said.

This is the only module that knows `torch.distributed`.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from htsr.errors import HtsrError, UsageError

CPU = torch.device("cpu")
PATIENCE = timedelta(hours=2)  # rank 0 may have to scan a large model while the others wait


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run; without others every method is a formality."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = CPU  # where numbers that are exchanged have to lie

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum_into(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, which all give the same list; the same bits everywhere."""
        if self.size == 1:
            return
        there = [tensor.to(self.device).contiguous() for tensor in tensors]
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in there]:
            work.wait()
        for tensor, total in zip(tensors, there, strict=True):
            if tensor is not total:
                tensor.copy_(total)

    def totals(self, *values: float) -> list[float]:
        """Sums over the ranks, in fp64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on some rank."""
        return self.totals(float(flag))[0] > 0

    def agree(self, what: str, value: str) -> None:
        """HtsrError on every rank unless `value` is the same on all of them."""
        if self.size == 1:
            return
        digest = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "big") >> 1
        mine = torch.tensor([digest], device=self.device)
        others = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(others, mine)
        if len({int(other) for other in others}) > 1:
            raise HtsrError(
                f"{what} differ between the processes (this is {self.rank} of {self.size}): start all of them with one "
                "command, on machines of a kind"
            )

    def agree_on_bits(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """The same of tensors, by the sums of their bits as whole numbers."""
        if self.size == 1:
            return
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = [t.detach().view(whole[t.element_size()]).sum(dtype=torch.int64) for t in tensors.values()]
        self.agree(what, repr([int(total) for total in sums]))

    def wait(self) -> None:
        """Return when every rank is here."""
        if self.size > 1:
            self.totals(0.0)

    @contextmanager
    def lead_first(self) -> Iterator[None]:
        """What stands inside is done by rank 0 first; the others then find in its caches what it made."""
        if not self.leads:
            self.wait()
        try:
            yield
        finally:
            if self.leads:
                self.wait()

    def pick(self, device: str) -> str:
        """The device that a setting names; of several CUDA devices each process of a machine takes its own."""
        if self.size == 1:
            return device
        if device in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        if device.startswith("cuda:"):
            raise UsageError(f"--device {device} names one device for {self.size} processes: use auto or cuda")
        return device


ALONE = Ranks()


def join(device: str) -> Ranks:
    """The ranks of this run, from the environment that torchrun sets; alone without it.

    device: the setting `--device`. A process group that is there (the caller's, or that of an earlier run) is used; one
    that is made here ends with the process, for a second one cannot safely be opened at the same address.

    Raises: UsageError when WORLD_SIZE promises other processes and the variables that lead to them are not there.
    """
    if dist.is_available() and dist.is_initialized():
        return _ranks(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(f"WORLD_SIZE is {size} and {missing[0]} is not set: start the processes with torchrun")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    return _ranks(device)


def _ranks(device: str) -> Ranks:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_cuda = device != "cpu" and dist.get_backend() == "nccl"
    place = torch.device("cuda", local) if on_cuda else CPU
    return Ranks(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local, device=place)

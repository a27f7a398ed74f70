"""A run of several processes: each computes its share of a step's micro-batches, and all make the same update.

torchrun starts them (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT in the environment), on one machine or on
several that share a file system. A step sees batch x accum x processes sequences. The processes exchange what the
optimizer gathered: of a projected matrix the projected gradient, its full gradient only in a step that computes a new
basis. Draws, data order, learning rate and random numbers are pure functions of seed and step, so nothing else has to
be sent; hashes check that the ranks agree. Only rank 0 writes files and messages.

This is the only module of owlore that imports `torch.distributed`.
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
TIMEOUT = timedelta(hours=2)  # rank 0 may have to scan a large model while the others wait


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run; in a run of one process no method communicates.

    Attributes:
        rank: index of this process among all.
        size: number of processes.
        local_rank: index of this process on its machine.
        device: where tensors have to be to be exchanged.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = CPU

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def sum_into(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, with the same bits on each; all give the same list."""
        if self.size == 1:
            return
        sums = [tensor.to(self.device).contiguous() for tensor in tensors]
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in sums]:
            work.wait()
        for tensor, total in zip(tensors, sums, strict=True):
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
        """Whether the flag is true on some rank."""
        return self.totals(float(flag))[0] > 0

    def agree(self, what: str, value: str) -> None:
        """Check that all ranks have the same value.

        Args:
            what: name of the value in plural, for the message.
            value: is compared by its hash.

        Raises:
            HtsrError: on every rank, where the values differ.
        """
        if self.size == 1:
            return
        digest = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "big") >> 1
        own_digest = torch.tensor([digest], device=self.device)
        digests = [torch.empty_like(own_digest) for _ in range(self.size)]
        dist.all_gather(digests, own_digest)
        if len({int(other) for other in digests}) > 1:
            raise HtsrError(
                f"{what} differ between the processes (this is {self.rank} of {self.size}): start all of them with one "
                "command, on machines of a kind"
            )

    def agree_on_bits(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Check as `agree` that all ranks have the same tensors, by the sums of their bits as integers."""
        if self.size == 1:
            return
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = [t.detach().view(integers[t.element_size()]).sum(dtype=torch.int64) for t in tensors.values()]
        self.agree(what, repr([int(total) for total in sums]))

    def wait(self) -> None:
        """Return when every rank has called this."""
        if self.size > 1:
            self.totals(0.0)

    @contextmanager
    def lead_first(self) -> Iterator[None]:
        """Let rank 0 run what is inside first, so that the others find its results in the caches."""
        if not self.leads:
            self.wait()
        try:
            yield
        finally:
            if self.leads:
                self.wait()

    def device_name(self, device: str) -> str:
        """The device that this process uses for the setting `--device`: of several GPUs each process has its own.

        Raises:
            UsageError: the setting names one GPU for several processes.
        """
        if self.size == 1:
            return device
        if device in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        if device.startswith("cuda:"):
            raise UsageError(f"--device {device} names one device for {self.size} processes: use auto or cuda")
        return device


ALONE = Ranks()


def join(device: str) -> Ranks:
    """The ranks of this run, from the environment that torchrun sets; `ALONE` without it.

    A process group that exists (the caller's, or that of an earlier run) is used. One that is opened here is kept until
    the process ends, because a second one cannot safely be opened at the same address.

    Args:
        device: the setting `--device`.

    Raises:
        UsageError: WORLD_SIZE is more than 1 and another variable of torchrun is not set.
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
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)
    return _ranks(device)


def _ranks(device: str) -> Ranks:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_cuda = device != "cpu" and dist.get_backend() == "nccl"
    exchange = torch.device("cuda", local) if on_cuda else CPU
    return Ranks(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local, device=exchange)

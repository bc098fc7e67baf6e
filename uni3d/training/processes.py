"""Several processes that train one network together, one per GPU, started by `torchrun`.

Every process holds all weights, works on its share of each batch, and takes the same step with the sum of the
gradients. Decisions that hang on a clock or a signal are made by the first process and told to the others.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import _foreach_copy_ as copy_each_  # pyright: ignore[reportPrivateImportUsage]
from torch import distributed as dist

_PATIENCE = datetime.timedelta(hours=12)  # the others wait while the first does what only one can do


@dataclass(frozen=True)
class Processes:
    """This process among `num`; alone (the default) every method is without effect."""

    rank: int = 0
    num: int = 1
    local_rank: int = 0
    """Number on its own machine: which GPU it takes."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """`device`, or this process's own GPU where "cuda" names none and several processes share them."""
        if self.num > 1 and device.type == "cuda" and device.index is None:
            return torch.device("cuda", self.local_rank)
        return device

    def add_up_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one message."""
        if self.num == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        sums = flat.split([tensor.numel() for tensor in tensors])
        copy_each_(
            [tensor.detach() for tensor in tensors],
            [total.view_as(tensor) for total, tensor in zip(sums, tensors, strict=True)],
        )

    def share(self, num: int) -> slice:
        """This process's part of `num` rows, the last one shorter where they do not divide."""
        size = -(-num // self.num)
        return slice(min(self.rank * size, num), min((self.rank + 1) * size, num))

    def join_rows(self, rows: Tensor, num: int) -> Tensor:
        """The `num` rows of which this process made `share(num)`, in order."""
        if self.num == 1:
            return rows
        size = -(-num // self.num)
        padded = rows.new_zeros(size, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        joined = [torch.empty_like(padded) for _ in range(self.num)]
        dist.all_gather(joined, padded)
        return torch.cat(joined)[:num]

    def as_main_says(self, *values: float) -> tuple[float, ...]:
        """The first process's `values`; goes over the network of the CPUs, so no GPU is waited for."""
        if self.num == 1:
            return values
        message = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(message, src=0)
        return tuple(message.tolist())

    def wait(self) -> None:
        """Until all processes are here."""
        self.as_main_says(0.0)


@contextlib.contextmanager
def joined_processes(*, uses_cuda: bool) -> Iterator[Processes]:
    """The processes that `torchrun` started, or this one alone where it did not."""
    num = int(os.environ.get("WORLD_SIZE", "1"))
    if num == 1 or not dist.is_available():
        yield Processes()
        return
    processes = Processes(int(os.environ["RANK"]), num, int(os.environ.get("LOCAL_RANK", "0")))
    if uses_cuda:
        torch.cuda.set_device(processes.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if uses_cuda else "gloo", timeout=_PATIENCE)
    try:
        yield processes
    finally:
        dist.destroy_process_group()

"""The processes that share every batch: several under torchrun, or one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Its functions keep the group that is the default when they are imported, as their arguments'
# defaults. DistributedDataParallel imports it: too late, a group that is kept cannot be left.
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Group:
    """This process in the group that trains together."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, batch: int, per_device: int) -> tuple[int, int]:
        """Samples of a forward pass, and forward passes of a step, in this process.

        Raises:
            ValueError: ``batch`` is not ``per_device`` x accumulation x processes.
        """
        if batch % self.world:
            raise ValueError(
                f"a batch of {batch} does not divide over {self.world} processes; allowed: "
                f"multiples of {self.world}"
            )
        mine = batch // self.world
        micro = min(mine, per_device)
        if mine % micro:
            raise ValueError(
                f"a batch of {batch} is {mine} samples for each of {self.world} processes, which "
                f"per_device_batch={per_device} does not divide; allowed: divisors of {mine}"
            )
        return micro, mine // micro

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in any process; the hosts exchange it, and no device waits."""
        if self.world == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [bool(flag) for flag in found]

    def total(self, mine: Any) -> Any:
        """The sum of the processes' tensors."""
        if self.world == 1:
            return mine
        total = mine.clone()
        dist.all_reduce(total)
        return total

    def slice(self, size: int) -> range:
        """The items of ``size`` that belong to this process."""
        return range(self.rank * size // self.world, (self.rank + 1) * size // self.world)

    def join(self, mine: Tensor) -> Tensor:
        """Join the rows of all processes' slices, in order, on the CPU if there are several."""
        if self.world == 1:
            return mine
        return torch.cat(self.gather(mine.cpu()))

    def as_the_first(self, tensors: Iterable[Tensor]) -> None:
        """Copy the first process's values into the tensors, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """Collect the value of each process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@dataclass(frozen=True)
class Place:
    """The device and the precision with which this process computes."""

    group: Group
    device: torch.device
    precision: str

    @classmethod
    def of(cls, group: Group, name: str, precision: str) -> Place:
        """The place for a device name; ``auto`` is the process's own GPU if there is one."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda":
            torch.cuda.set_device(group.local_rank)
            name = f"cuda:{group.local_rank}"
        return cls(group, torch.device(name), precision)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap the model in this precision, with gradients averaged over the processes."""
        model = self.in_precision(model)
        if self.group.world == 1:
            return model
        return DistributedDataParallel(
            model, device_ids=[self.device.index] if self.device.type == "cuda" else None
        )

    def in_precision(self, model: nn.Module) -> nn.Module:
        """Wrap the model in this precision, for this process alone."""
        return InBFloat16(model) if self.precision == "bf16" else model

    def take(self, tensor: Tensor) -> Tensor:
        """Move the tensor to this device."""
        return tensor.to(self.device, non_blocking=True)


class InBFloat16(nn.Module):
    """A module under autocast to bfloat16, with float32 outputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        """Return the module's outputs."""
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            outputs = self.module(*inputs)
        if isinstance(outputs, Tensor):
            return outputs.float()
        return tuple(output.float() for output in outputs)


def without_reduction(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """A context in which gradients stay in the process, except those of the last micro-batch."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


@contextmanager
def processes() -> Iterator[Group]:
    """Join the processes that torchrun started, if it did, and leave them at the end.

    Leaving ends the threads that communicate. Those that live on while Python ends abort it.
    """
    if "WORLD_SIZE" not in os.environ:
        yield Group()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Group(dist.get_rank(), int(os.environ["LOCAL_RANK"]), dist.get_world_size())
    finally:
        dist.destroy_process_group()

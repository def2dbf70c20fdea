"""Sharded tensors: the part of a DTensor in this process, and sums over all parts.

The state of a DTensor parameter is a DTensor placed like it, as torch.distributed.checkpoint needs;
plans step the local tensors of both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .together import Call

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class Sharding(NamedTuple):
    """How a DTensor is sharded: split over ``dims`` of the mesh, repeated over the others."""

    mesh: DeviceMesh
    dims: tuple[int, ...]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, with any placements."""
    # if there is a DTensor, this is imported; importing it takes longer than the whole package
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor in this process: a DTensor's local tensor, or the tensor itself."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]  # to_local() makes views
    return part


def sharding_of(param: Tensor) -> Sharding | None:
    """How a parameter is sharded; None if it is not.

    Raises:
        RuntimeError: its placement is ``Partial``: the parts are summands.
    """
    if not is_sharded(param):
        return None
    mesh, placements = _layout(param)
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError(
            f"params: a parameter has the placements {placements}; allowed: Shard and Replicate"
        )
    return Sharding(mesh, tuple(i for i, p in enumerate(placements) if not p.is_replicate()))


def placed_alike(tensor: Tensor, other: Tensor) -> bool:
    """Whether both have their elements in the same processes, as any two whole tensors do."""
    if not is_sharded(tensor) and not is_sharded(other):
        return True
    return is_sharded(tensor) and is_sharded(other) and _layout(tensor) == _layout(other)


def describe_placement(tensor: Tensor) -> str:
    """How a tensor is placed, as text for messages."""
    if not is_sharded(tensor):
        return "whole in every process"
    mesh, placements = _layout(tensor)
    return f"placed {placements} on {mesh}"


def check_copyable(name: str, value: Any) -> Tensor:
    """Return ``value`` if it is a tensor whose values can be copied; else raise ValueError."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; allowed: a tensor")
    kinds = {"meta": value.is_meta, "quantized": value.is_quantized}
    kinds[str(value.layout)] = value.layout != torch.strided
    for kind, it_is in kinds.items():
        if it_is:
            raise ValueError(f"{name} is a {kind} tensor; allowed: a plain one, with values")
    return value


def repeats(tensor: Tensor) -> bool:
    """Whether elements share memory, as those of ``expand`` do."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return False
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def copy(target: Tensor, source: Tensor) -> Tensor:
    """Copy ``source`` into ``target`` of the same shape, wherever both are; return ``target``."""
    if is_sharded(target) and not is_sharded(source):
        from torch.distributed.tensor import distribute_tensor

        source = source.to(target.device)  # every process holds all of it, so nothing is sent
        source = distribute_tensor(source, *_layout(target), src_data_rank=None)
    elif is_sharded(source) and not is_sharded(target):
        source = _dtensor(source).full_tensor()
    return target.copy_(source)


def total(sums: Sequence[Tensor], shardings: Sequence[Sharding | None]) -> list[Tensor]:
    """Turn sums over local parts into sums over all processes.

    Every process must call it, even if its parts are empty. It makes one all-reduce for each
    distinct sharding and mesh dimension, in the order of their first appearance.

    Args:
        sums: 0-dim tensors.
        shardings: how the tensor behind each sum is sharded, None if it is whole.

    Returns:
        One sum for each distinct sharding, on the device of its first part.
    """
    if not any(shardings):
        return list(sums)
    members: dict[Sharding | None, list[Tensor]] = {}
    for value, where in zip(sums, shardings, strict=True):
        members.setdefault(where, []).append(value)
    return [_reduced(where, values) for where, values in members.items()]


def _reduced(where: Sharding | None, values: Sequence[Tensor]) -> Tensor:
    device = values[0].device
    value = torch.stack([v.to(device, non_blocking=True) for v in values]).sum()
    if where is not None:
        for dim in where.dims:
            torch.distributed.all_reduce(value, group=where.mesh.get_group(dim))
    return value


class Shards:
    """The DTensors among the tensors that plans step; the plans know the local tensors.

    Args:
        params: parameters.
        averages: their averages.
        states: all other tensors of their states.
    """

    def __init__(
        self, params: Iterable[Tensor], averages: Iterable[Tensor], states: Iterable[Tensor]
    ) -> None:
        self._params = _dtensors(params)
        self._layouts = [_layout(param) for param in self._params]
        self._averages = _dtensors(averages)
        self._moving: list[DTensor] = []  # parameters with a gradient
        held = (*self._params, *self._averages, *_dtensors(states))
        self._locals = [(tensor, tensor._local_tensor) for tensor in held]

    def unchanged(self) -> bool:
        """Whether every DTensor has the local tensor that it had."""
        return all(tensor._local_tensor is part for tensor, part in self._locals)

    @torch.no_grad()
    def redistribute_gradients(self) -> None:
        """Redistribute each gradient in ``.grad`` to its parameter's placements; values stay.

        Raises:
            RuntimeError: a gradient is not a DTensor, or on another mesh.
        """
        self._moving = [param for param in self._params if param.grad is not None]
        for param, (mesh, placements) in zip(self._params, self._layouts, strict=True):
            grad = param.grad
            if grad is None:
                continue
            if type(grad) is not type(param) or grad.device_mesh != mesh:
                raise RuntimeError(
                    f"grad does not match its parameter: it is {describe_placement(grad)}, "
                    f"allowed: a DTensor on {mesh}"
                )
            if grad.placements != placements:
                param.grad = grad.redistribute(mesh, placements)

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """While open, put gradients into ``.grad`` of the local parameters, where plans read them.

        They are removed on exit, because they would outlive ``zero_grad()``.
        """
        try:
            for param in self._params:
                grad = param.grad
                param._local_tensor.grad = None if grad is None else _local_gradient(grad, param)
            yield
        finally:
            for param in self._params:
                param._local_tensor.grad = None

    def marking_written(self) -> Call:
        """The call that tells autograd that parameters and averages were written."""
        return partial(torch._C._increment_version, [*self._moving, *self._averages])


def fsdp_modules(module: nn.Module) -> list[Any]:
    """The modules in ``module`` that FSDP2 has wrapped."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [m for m in module.modules() if fsdp is not None and isinstance(m, fsdp.FSDPModule)]


def reshard(modules: Iterable[Any]) -> None:
    """Drop the full parameters that FSDP2 may have kept from a forward pass without a backward.

    They are copies, which FSDP2 would go on using after the sharded parameters have changed.
    """
    for module in modules:
        module.reshard()


def _layout(tensor: Tensor) -> tuple[DeviceMesh, tuple[Any, ...]]:
    dtensor = _dtensor(tensor)
    return dtensor.device_mesh, dtensor.placements


def _local_gradient(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient's local tensor; waits for one that is still being communicated."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    part = local(grad)
    if isinstance(part, AsyncCollectiveTensor):
        part = part.wait()
    return part.to(param.dtype)


def _dtensors(tensors: Iterable[Tensor]) -> list[DTensor]:
    return [_dtensor(tensor) for tensor in tensors if is_sharded(tensor)]


def _dtensor(tensor: Tensor) -> DTensor:
    return tensor  # type: ignore[return-value]

"""Properties of a parameter: its dtypes, its memory, and the tensor that holds its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import sharding

# Dtype of arithmetic and averages by parameter dtype; half precision is computed in float32.
COMPUTE_DTYPE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.complex64: torch.complex64,
    torch.complex128: torch.complex128,
}


# The most exact real dtype of devices that do not have float64: Apple's GPUs.
NARROW = {"mps": torch.float32}


def widest(device: torch.device) -> torch.dtype:
    """The most exact real dtype of a device, float64 on nearly all."""
    return NARROW.get(device.type, torch.float64)


def is_there(param: Tensor) -> bool:
    """Whether a parameter has values, or a gradient asks to step it as if it had.

    A lazy parameter has no values before its module's first forward, and one on the meta device
    never has any. Without a gradient it is left alone, and has no state.
    """
    return not is_lazy(param) and (param.device.type != "meta" or param.grad is not None)


def is_fixed(param: Tensor) -> bool:
    """Whether the parameter cannot be trained: frozen integers, quantized weights and the like.

    Its average is its value, or the teacher's tensor for it.
    """
    fixed = not param.requires_grad and param.grad is None
    return fixed and param.dtype not in COMPUTE_DTYPE


def dense_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Strides of the dimensions longer than one; None if memory has gaps or overlaps."""
    if tensor.numel() == 0:
        return ()
    spans = [(s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1]
    expected = 1
    for stride, size in sorted(spans):
        if stride != expected:
            return None
        expected *= size
    return tuple(stride for stride, _ in spans)


def weight_of(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """The tensor that the rule steps and averages follow: the master, else the parameter."""
    held: Tensor = state["master"] if "master" in state else param.detach()
    return held


def beside(value: Tensor, param: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """``value`` as the kernels need it: on the parameter's device, in its memory order."""
    if value.shape != param.shape:
        raise RuntimeError(
            f"state {key!r} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}"
        )
    in_order = value.stride() == param.stride() or dense_order(param) is None
    in_order = in_order and sharding.placed_alike(value, param)
    if in_order and value.device == param.device and value.dtype == dtype:
        return value
    return sharding.copy(torch.empty_like(param, dtype=dtype).detach(), value)

"""Properties of a tensor below its Python class, for the extension's stand-ins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

C: Any = torch._C  # its type stubs are incomplete


def bits(*of: DispatchKey) -> int:
    """Torch's dispatch keys as bits, as in :func:`keys`."""
    found = 0
    for key in of:
        found |= DispatchKeySet(key).raw_repr()
    return found


_PYTHON = bits(DispatchKey.Python)


def keys(tensor: Tensor) -> int:
    """The keys by which torch's dispatcher treats a tensor, as bits."""
    found: int = C._dispatch_keys(tensor).raw_repr()
    return found


def is_subclass(tensor: Tensor) -> bool:
    """Whether the tensor's operators are Python functions."""
    return bool(keys(tensor) & _PYTHON)


def extent(tensor: Tensor) -> int:
    """Number of elements from the first to the last one in memory."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))

"""Averages of two values, right also where their difference is not finite: tensors, element-wise.

``csrc/rules/blending.h`` and ``kernels/rules.py`` hold the same operations under the same names.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lerp(start: Tensor, end: Tensor, weight: float | Tensor) -> Tensor:
    """``start + weight*(end - start)`` with a weight in ``[0, 1]``.

    Weight 0 gives ``start`` and weight 1 ``end``, whatever the other is; a constant stays what it
    is, an infinity too; opposite infinities have no average (NaN).
    """
    weight = _beside(weight, start)
    return blend(start, end, weight * end, weight)


def lerp_square(start: Tensor, value: Tensor, weight: float | Tensor) -> Tensor:
    """``lerp(start, value*value, weight)``, also where only the weighted square is finite."""
    weight = _beside(weight, start)
    return blend(start, value * value, weight * value * value, weight)


def blend(start: Tensor, end: Tensor, part: Tensor, weight: Tensor) -> Tensor:
    """``start + weight*(end - start)``, or from the shares where the difference is not finite.

    Args:
        part: ``weight*end``.
        weight: 0-dim, of the values' dtype and device.
    """
    change = end - start
    rest = 1.0 - weight
    near = torch.where(weight < 0.5, start + weight * change, end - change * rest)
    kept = torch.where(weight != 1.0, rest * start, -0.0)
    taken = torch.where(weight != 0.0, part, -0.0)
    return torch.where(change.isfinite(), near, kept + taken)


def moved(start: Tensor, end: Tensor) -> Tensor:
    """How far a value has moved: nowhere also where it stays infinite."""
    return torch.where(start == end, 0.0, end - start)


def _beside(weight: float | Tensor, value: Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.to(value.device, value.dtype)
    return torch.full((), weight, dtype=value.dtype, device=value.device)

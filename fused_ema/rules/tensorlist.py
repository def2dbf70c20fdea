"""A list of tensors with the methods of one tensor, each a single ``torch._foreach_*`` call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TensorList:
    """Tensors updated together: what :mod:`fused_ema.rules` uses, with torch's meaning.

    A trailing underscore modifies the tensors in place and returns the list itself.
    Torch's ``lerp`` gives NaN at infinities, and where the difference of two values overflows.
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    def sqrt(self) -> TensorList:
        return TensorList(torch._foreach_sqrt(self.tensors))

    def mul(self, other: TensorList | Tensor | float) -> TensorList:
        return TensorList(torch._foreach_mul(self.tensors, _operand(other)))

    def div(self, other: TensorList) -> TensorList:
        return TensorList(torch._foreach_div(self.tensors, other.tensors))

    def add(self, other: TensorList | float, *, alpha: float = 1.0) -> TensorList:
        if isinstance(other, TensorList):
            return TensorList(torch._foreach_add(self.tensors, other.tensors, alpha=alpha))
        return TensorList(torch._foreach_add(self.tensors, other))

    def addcmul(self, one: TensorList, other: TensorList, *, value: float) -> TensorList:
        factors = one.tensors, other.tensors
        return TensorList(torch._foreach_addcmul(self.tensors, *factors, value=value))

    def clamp_min(self, least: float) -> TensorList:
        return TensorList(torch._foreach_clamp_min(self.tensors, least))

    def mul_(self, other: float) -> TensorList:
        torch._foreach_mul_(self.tensors, other)
        return self

    def add_(self, other: TensorList, *, alpha: float = 1.0) -> TensorList:
        torch._foreach_add_(self.tensors, other.tensors, alpha=alpha)
        return self

    def sub_(self, other: TensorList, *, alpha: float = 1.0) -> TensorList:
        torch._foreach_sub_(self.tensors, other.tensors, alpha=alpha)
        return self

    def clamp_min_(self, other: TensorList) -> TensorList:
        torch._foreach_clamp_min_(self.tensors, other.tensors)
        return self

    def lerp_(self, end: TensorList, weight: float) -> TensorList:
        torch._foreach_lerp_(self.tensors, end.tensors, weight)
        return self

    def copy_(self, source: TensorList) -> TensorList:
        torch._foreach_copy_(self.tensors, source.tensors)
        return self

    def to(self, dtype: torch.dtype, copy: bool = False) -> TensorList:
        if not copy and all(tensor.dtype == dtype for tensor in self.tensors):
            return self
        return TensorList([tensor.to(dtype, copy=copy) for tensor in self.tensors])


def _operand(other: TensorList | Tensor | float) -> list[Tensor] | Tensor | float:
    return other.tensors if isinstance(other, TensorList) else other

"""The specification: one parameter at a time, torch operations, :mod:`fused_ema.rules`."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..buckets import Bucket
from . import eager
from .eager import EagerPlan, Wrap
from .plan import Fold

NAME = "reference"


def unsupported(bucket: Bucket) -> str | None:
    return eager.unsupported(bucket)


class Differentiable:
    """A tensor whose methods let gradients reach their scalars; used as the tensor itself.

    torch takes ``alpha`` as a number. One that is a tensor becomes a factor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Callable[..., Differentiable]:
        method = getattr(self.tensor, name)

        def call(*operands: Any, **options: Any) -> Differentiable:
            given = [x.tensor if isinstance(x, Differentiable) else x for x in operands]
            if isinstance(options.get("alpha"), Tensor):
                given[0] = given[0].clone() * options.pop("alpha")  # it may be written after this
            return Differentiable(method(*given, **options))

        return call


class ReferencePlan(EagerPlan):
    """Every slot is a row of its own, so that the operands are plain tensors."""

    def prepare(self, fold: Fold) -> bool:
        with torch.set_grad_enabled(self.bucket.key.differentiable):
            return super().prepare(fold)

    def run(self, control: Tensor | None) -> None:
        differentiable = self.bucket.key.differentiable
        with torch.set_grad_enabled(differentiable):
            for row in self.rows:
                wrap: Wrap = _graphed if differentiable else itemgetter(0)
                scalars = map(self._scalar, row.scalars)
                single = row._replace(scalars=row.scalars and type(row.scalars)(*scalars))
                for i, slot in enumerate(row.slots):
                    one = single._replace(slots=[slot], grads=row.grads[i : i + 1])
                    self.step_row(one, wrap, control)
        self.release()

    def _scalar(self, value: Any) -> Any:
        """A number, or a tensor that gradients reach, rounded to the arithmetic's precision."""
        return value.to(self._device, self._dtype) if isinstance(value, Tensor) else value


def _graphed(tensors: list[Tensor]) -> Differentiable:
    return Differentiable(tensors[0])


def plan(bucket: Bucket) -> ReferencePlan:
    return ReferencePlan(bucket)

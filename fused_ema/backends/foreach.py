"""The same formulas on lists of tensors through ``torch._foreach_*``; any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..buckets import Bucket
from ..tensorlist import TensorList
from . import eager
from .eager import EagerPlan

NAME = "foreach"


def unsupported(bucket: Bucket) -> str | None:
    if bucket.key.differentiable:
        return "differentiable=True needs the reference backend"
    return eager.unsupported(bucket)


class ForeachPlan(EagerPlan):
    @torch.no_grad()
    def run(self, control: Tensor | None) -> None:
        for row in self.rows:
            self.step_row(row, TensorList, control)
        self.release()


def plan(bucket: Bucket) -> ForeachPlan:
    return ForeachPlan(bucket)

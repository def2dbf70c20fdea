"""The specification: one parameter at a time, torch operations, :mod:`fused_ema.rules`."""

from __future__ import annotations

from operator import itemgetter

import torch
from torch import Tensor

from ..buckets import Bucket
from . import eager
from .eager import EagerPlan

NAME = "reference"


def unsupported(bucket: Bucket) -> str | None:
    return eager.unsupported(bucket)


class ReferencePlan(EagerPlan):
    """Every slot is a row of its own, so that the operands are plain tensors."""

    def run(self, control: Tensor | None) -> None:
        with torch.set_grad_enabled(self.bucket.key.differentiable):
            for row in self.rows:
                for slot in row.slots:
                    self.step_row(row._replace(slots=[slot]), itemgetter(0), control)


def plan(bucket: Bucket) -> ReferencePlan:
    return ReferencePlan(bucket)

"""The same formulas on lists of tensors through ``torch._foreach_*``; any device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from operator import itemgetter

import torch
from torch import Tensor

from ...dtypes import widest
from ...extension import native
from ...rules.tensorlist import TensorList
from ...sharding import local
from ..buckets import Bucket
from ..gradients import is_fake
from . import eager
from .eager import EagerPlan, Row, Wrap, real

NAME = "foreach"
# Values below largest**EXPONENT have finite squares and differences. It is less than one half, so
# that a product with a decay or two may be added.
EXPONENT = 0.45


def unsupported(bucket: Bucket) -> str | None:
    if bucket.key.differentiable:
        return "differentiable=True needs the reference backend"
    return eager.unsupported(bucket)


class ForeachPlan(EagerPlan):
    """Rows are stepped as lists, but for tensors with values that torch's ``lerp`` cannot keep.

    Those are stepped one by one, and so are tensor subclasses. The largest values of others are
    looked at before every step, which waits for the device once a row.
    """

    @torch.no_grad()
    def run(self, control: Tensor | None) -> None:
        for row in self.rows:
            for part, wrap in self._parts(row, control):
                self.step_row(part, wrap, control)
        self.release()

    def _parts(self, row: Row, control: Tensor | None) -> Iterator[tuple[Row, Wrap]]:
        """The row without what has to be stepped one by one, then each of those."""
        params = [local(slot.param) for slot in row.slots]
        looked_on = torch._C._len_torch_dispatch_stack() > 0
        if looked_on or self._device.type == "meta" or any(map(is_fake, params)):
            yield row, TensorList  # there are no values to look at
            return
        small = [False] * len(params)
        if all(map(native.is_plain, params)):
            limit = torch.finfo(self._dtype).max ** EXPONENT
            small = [size < limit for size in self._largest(row, control)]
        listed = [i for i, is_small in enumerate(small) if is_small]
        if listed:
            yield _part(row, listed), TensorList
        for i, is_small in enumerate(small):
            if not is_small:
                yield _part(row, [i]), itemgetter(0)

    def _largest(self, row: Row, control: Tensor | None) -> list[float]:
        """The largest magnitude in all of a slot's tensors, NaN where there is one."""
        operands = [self._weights(row)]
        keys = self.bucket.key.emas
        if row.scalars:
            operands.append([real(grad) for grad in row.grads])
            keys = (*keys, *self.bucket.state_keys)
        operands += [[real(slot.state[key]) for slot in row.slots] for key in keys]
        sizes = torch.stack([_magnitudes(tensors) for tensors in operands])
        if control is not None and row.scalars:
            sizes[1] *= control[0].abs().clamp(min=1.0)
        found: list[float] = sizes.amax(0).tolist()
        return found


def _part(row: Row, indices: list[int]) -> Row:
    grads = [row.grads[i] for i in indices] if row.grads else []
    return row._replace(slots=[row.slots[i] for i in indices], grads=grads)


def _magnitudes(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude in each tensor; 0 in an empty one."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    norms = iter(torch._foreach_norm(filled, ord=math.inf) if filled else ())
    wide = widest(tensors[0].device)
    zero = tensors[0].new_zeros((), dtype=wide)
    return torch.stack([next(norms).to(wide) if t.numel() else zero for t in tensors])


def plan(bucket: Bucket) -> ForeachPlan:
    return ForeachPlan(bucket)

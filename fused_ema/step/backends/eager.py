"""What the torch-operation backends share: gradients to rows, a row to one update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dtypes import widest
from ...ema import formats
from ...extension import native
from ...rules.blending import moved
from ...rules.rule import ema_update
from ...rules.tensorlist import TensorList
from ...sharding import local
from ..buckets import Bucket, Slot
from ..gradients import Ending, end, is_fake, taken
from .plan import Fold

# Makes one operand of a row's tensors: a TensorList, or the only tensor itself.
Wrap = Callable[[list[Tensor]], Any]


def unsupported(bucket: Bucket) -> str | None:
    if bucket.key.differentiable and bucket.key.state_format != "full":
        return f"differentiable=True with state_format={bucket.key.state_format!r}"
    if bucket.key.differentiable and bucket.key.sharding is not None:
        return "differentiable=True with DTensor parameters"
    if bucket.key.rounds and bucket.key.device.type == "meta":
        return "16-bit formats on the meta device, which has no values to round"
    return "capturable=True: it folds the scalars on the host" if bucket.key.capturable else None


class Row(NamedTuple):
    """Slots that take the same scalars; ``scalars`` is empty where no gradient came."""

    scalars: Any
    ema_rates: Sequence[float]
    advance: float
    seed: int
    slots: list[Slot]
    grads: list[Tensor]  # of the slots, as they were prepared; none where no gradient came


class EagerPlan:
    """A bucket stepped by torch operations; states are looked up anew at every step."""

    captured = False
    skipping = None
    num_sums = 1

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.rows: list[Row] = []
        self._strides = [slot.param.stride() for slot in bucket.slots]
        self._device = bucket.key.device
        self._dtype = bucket.compute_dtype
        if self._dtype.is_complex:
            self._dtype = self._dtype.to_real()

    def prepare(self, fold: Fold) -> bool:
        members: dict[tuple[int, float | None], tuple[list[Slot], list[Tensor]]] = {}
        key = self.bucket.key
        for slot, strides in zip(self.bucket.slots, self._strides, strict=True):
            step = None
            # memory that has come to be without gaps is for another backend
            if slot.param.stride() != strides or not self._as_planned(slot):
                return False
            grad = slot.param.grad if self.bucket.takes_grads else None
            if grad is not None:
                if key.frozen:
                    return False
                if key.sharding is not None:  # else it has to be whole, which is looked at
                    grad = local(grad)
                grad = taken(grad, local(slot.param), key.differentiable)
                step = slot.state["step"].item() + fold.advances[slot.group]
            slots, grads = members.setdefault((slot.group, step), ([], []))
            slots.append(slot)
            if grad is not None:
                grads.append(grad)
        self.rows = []
        for (group, step), (slots, grads) in members.items():
            scalars, ema_rates = fold(group, step)
            ema_rates = ema_rates if key.emas else ()
            seed = fold.seed(group) if key.rounds else 0
            self.rows.append(Row(scalars, ema_rates, fold.advances[group], seed, slots, grads))
        return True

    def release(self) -> None:
        self.rows = []

    def _as_planned(self, slot: Slot) -> bool:
        param, key = slot.param, self.bucket.key
        return (
            param.dtype == key.dtype
            and param.device == key.device
            and all(
                slot.state[k].shape == param.shape
                for k in (*self.bucket.state_keys, *self.bucket.key.emas)
            )
        )

    @torch.no_grad()
    def norm(self, partial_sums: Tensor | None, ending: Ending | None) -> None:
        if partial_sums is not None:
            partial_sums.copy_(self._sum_of_squares())
        if ending is not None:
            end(ending)

    def _sum_of_squares(self) -> Tensor:
        grads = [real(grad) for row in self.rows for grad in row.grads]
        wide = widest(self._device)
        sums = [torch.linalg.vector_norm(grad, dtype=wide).square() for grad in grads]
        zero = torch.zeros((), dtype=wide, device=self._device)
        total = torch.stack([zero, *sums]).sum()
        if native.is_plain(total) or is_fake(total) or torch._C._len_torch_dispatch_stack():
            return total
        # a factor for all gradients must not make subclasses of them
        return zero + total.item()

    def step_row(self, row: Row, wrap: Wrap, control: Tensor | None) -> None:
        """Rule and averages of one row, in place."""
        key = self.bucket.key
        if key.ema_format == "delta":
            old = [weight.clone() for weight in self._weights(row)]
            if row.scalars:
                self._apply_rule(row, wrap, control)
            self._move_differences(row, old)
            return
        move = self._move_averages if key.ema_format == "full" else self._move_rounded
        if key.ema_order == "before":
            move(row, wrap)
        if row.scalars:
            self._apply_rule(row, wrap, control)
        if key.ema_order == "after":
            move(row, wrap)

    def _apply_rule(self, row: Row, wrap: Wrap, control: Tensor | None) -> None:
        grad = wrap([real(grad) for grad in row.grads]).to(self._dtype)
        if control is not None:
            grad = grad.mul(control[0].to(self._dtype))
        states = [[real(slot.state[key]) for slot in row.slots] for key in self.bucket.state_keys]
        params = [real(slot.param) for slot in row.slots]
        master = self.bucket.key.master
        stored = [wrap(tensors) for tensors in (states if master else [params, *states])]
        # backward needs a step's values as they were: what the next one writes must not be those
        apart = self.bucket.key.differentiable
        working = [operand.to(self._dtype, copy=apart) for operand in stored]
        named = dict(zip(self.bucket.states, working[1:], strict=True))
        self.bucket.rule.update(working[0], grad, named, row.scalars)
        rounded = self.bucket.key.state_format != "full"
        kept = 1 if rounded else len(stored)  # the weights at least
        for operand, value in zip(stored[:kept], working, strict=False):
            if value is not operand:
                operand.copy_(value)
        if rounded:
            self._round_states(row, [as_list(value) for value in working[1:]])
        if master:
            wrap(params).copy_(stored[0])
        for slot in row.slots:
            slot.state["step"] += row.advance

    def _round_states(self, row: Row, values: list[list[Tensor]]) -> None:
        for k, (key, state) in enumerate(zip(self.bucket.states, values, strict=True)):
            for slot, value in zip(row.slots, state, strict=True):
                like = real(slot.param)
                bits = formats.element_bits(
                    row.seed, slot.param_index, formats.FIRST_STATE + k, like
                )
                real(slot.state[key]).copy_(formats.round_bfloat16(value, bits))

    @torch.no_grad()
    def _move_averages(self, row: Row, wrap: Wrap) -> None:
        for key, rate in zip(self.bucket.key.emas, row.ema_rates, strict=True):
            ema = wrap([real(slot.state[key]) for slot in row.slots])
            param = wrap(self._weights(row))
            ema_update(ema, param.to(self._dtype), rate)

    def _weights(self, row: Row) -> list[Tensor]:
        """What averages follow: the parameters, or their masters."""
        master = self.bucket.key.master
        return [real(slot.state["master"] if master else slot.param) for slot in row.slots]

    @torch.no_grad()
    def _move_rounded(self, row: Row, wrap: Wrap) -> None:
        for k, (key, rate) in enumerate(zip(self.bucket.key.emas, row.ema_rates, strict=True)):
            for slot, param in zip(row.slots, self._weights(row), strict=True):
                bits = formats.element_bits(row.seed, slot.param_index, k, real(slot.param))
                formats.follow(real(slot.state[key]), param.float(), rate, bits)

    @torch.no_grad()
    def _move_differences(self, row: Row, old: list[Tensor]) -> None:
        before = self.bucket.key.ema_order == "before"
        for k, (key, rate) in enumerate(zip(self.bucket.key.emas, row.ema_rates, strict=True)):
            for slot, param, was in zip(row.slots, self._weights(row), old, strict=True):
                bits = formats.element_bits(row.seed, slot.param_index, k, real(slot.param))
                change = moved(was.float(), param.float())
                formats.follow_delta(real(slot.state[key]), change, rate, bits, before)


def as_list(operand: Tensor | TensorList) -> list[Tensor]:
    return operand.tensors if isinstance(operand, TensorList) else [operand]


def real(tensor: Tensor) -> Tensor:
    """What lies here of a tensor, a complex one as pairs of reals; shares memory."""
    tensor = local(tensor)
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor

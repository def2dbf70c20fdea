"""What a device kernel folds the scalars of a bucket from, so that a captured graph goes on.

A record a param group: numbers of the group are constants of what is launched, tensors that lie on
the device are read there at every run, and so are the group's base steps, which the kernel counts.
The kernels of csrc/cuda/fold.h and :mod:`fused_ema.kernels.fold` read records alike.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...checks import check_range
from ...ema.decay import (
    CosineDecay,
    InverseGammaDecay,
    PowerDecay,
    WarmUpDecay,
    decay_at,
    decays,
)
from ...rules.rule import ema_kappa
from ...values import SIMPLE
from ..buckets import Bucket
from . import graphs

Group: TypeAlias = Mapping[str, Any]
Word: TypeAlias = int | float

# Base steps, the number of slots that read them, flags, rounding_seed, the kinds of the numbers.
HEAD = 5
# An average's decay: its kind, and what it is made of.
DECAY = 4
ITSELF = 0
# What a number is read as where it lies on the device.
KINDS = {
    torch.float64: 1,
    torch.float32: 2,
    torch.float16: 3,
    torch.bfloat16: 4,
    torch.int64: 5,
    torch.int32: 6,
}
KIND_BITS = 4
# Bits beside the rule's flags: kappa drives the averages alone, or the optimizer alone.
SCALES = {"all": 0, "ema": 1 << 32, "optimizer": 1 << 33}
# Schedules that kernels know, and their fields in order.
SCHEDULES: dict[type, tuple[int, tuple[str, ...]]] = {
    CosineDecay: (16, ("start", "total")),
    WarmUpDecay: (17, ("limit",)),
    InverseGammaDecay: (18, ("limit", "inv_gamma", "power")),
    PowerDecay: (19, ("gamma",)),
}
# What no one can change.
CONSTANT = {*SIMPLE, *SCHEDULES}


class _Known(NamedTuple):
    """The record of a group that holds constants alone, and what it was made from."""

    given: tuple[Any, ...]
    base_steps: int
    record: bytes


class GroupRecords:
    """The records of a capturable bucket's param groups.

    Args:
        bucket: a bucket whose slots fold on its device.

    Attributes:
        num_numbers: how many the rule folds.
        sizes: how many slots each group has, in the records' order.
        size: words of a record.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._rule = bucket.rule
        self._device = bucket.key.device
        self._num_emas = len(bucket.key.emas)
        self.num_numbers = len(bucket.rule.number_names)
        self.size = HEAD + self.num_numbers + DECAY * self._num_emas
        self._sizes = dict(sorted(Counter(slot.group for slot in bucket.slots).items()))
        self.sizes = list(self._sizes.values())
        self._clocked = bucket.clocked
        self._given = itemgetter(*bucket.rule.hyper, "ema_decay", "kappa_scales", "rounding_seed")
        self._known: dict[int, _Known] = {}
        self._held: list[Tensor] = []
        self._kept: list[list[Tensor]] = []

    def read(self, groups: Sequence[Group]) -> bytes:
        """The records of the step at hand; asks schedules, counts nothing.

        What lies on the device is held until the next call, by a capture for good: a graph goes on
        reading and counting there.

        Args:
            groups: the optimizer's param groups.

        Raises:
            ValueError: a schedule returns a number outside ``[0, 1]``. A tensor on the device is
                not looked at.
        """
        self._held = []
        if graphs.is_capturing(self._device):
            self._kept.append(self._held)
        return b"".join(self._record(index, groups[index]) for index in self._sizes)

    def _record(self, index: int, group: Group) -> bytes:
        """A group's record, made anew where a field has changed or is no constant."""
        given = self._given(group)
        base_steps = self._address(group["base_steps"])
        known = self._known.get(index)
        if known is not None and known.base_steps == base_steps and _are_same(known.given, given):
            return known.record
        num_held = len(self._held)
        record = self._made(index, group, base_steps)
        self._known.pop(index, None)
        if len(self._held) == num_held and _are_constant(given):
            self._known[index] = _Known(given, base_steps, record)
        return record

    def _made(self, index: int, group: Group, base_steps: int) -> bytes:
        kinds, numbers = 0, []
        values = [value for field in self._rule.numbers for value in _values(group[field])]
        for k, value in enumerate(values):
            kind, word = self._number(value)
            kinds |= kind << KIND_BITS * k
            numbers.append(word)
        waiting = self._sizes[index] if index in self._clocked else 0
        flags = self._rule.flag_bits(group) | SCALES[group["kappa_scales"]]
        seed = group["rounding_seed"]
        words = [base_steps, waiting, flags, seed, kinds, *numbers]
        if self._num_emas:
            for decay in decays(group["ema_decay"]):
                words += self._decay(decay, group)
        return struct.pack("=" + "".join(map(_code, words)), *words)

    def _decay(self, decay: Any, group: Group) -> list[Word]:
        """An average's kind, and the number or the schedule's fields."""
        kind, fields = SCHEDULES.get(type(decay), (ITSELF, ()))
        made_of = [getattr(decay, field) for field in fields]
        if made_of and SIMPLE.issuperset(map(type, made_of)):
            words: list[Word] = [kind, *map(float, made_of)]
        else:
            given = decay_at(decay, group["base_steps"], ema_kappa(group, group["kappa"]))
            if not self._is_there(given):
                check_range("ema_decay", given, 0.0, 1.0)
            words = list(self._number(given))
        return words + [0] * (DECAY - len(words))

    def _number(self, value: Any) -> tuple[int, Word]:
        """The kind and the word of a number: itself, or where it lies."""
        if not self._is_there(value):
            return ITSELF, float(value)
        value = value if value.dtype in KINDS else value.double()
        return KINDS[value.dtype], self._address(value)

    def _is_there(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self._device.type

    def _address(self, value: Tensor) -> int:
        """Where kernels find a tensor of one element, or a copy of one on another device."""
        if value.device != self._device:
            value = value.detach().to(self._device, non_blocking=True)
        self._held.append(value)
        return value.data_ptr()


def _are_constant(given: tuple[Any, ...]) -> bool:
    """Whether fields, none of which lies on the device, are what they are as long as they stay."""
    entries = [entry for value in given for entry in (value if type(value) is tuple else (value,))]
    return CONSTANT.issuperset(map(type, entries))


def _are_same(known: tuple[Any, ...], given: tuple[Any, ...]) -> bool:
    return all(
        old is new or (type(old) in SIMPLE and type(new) in SIMPLE and old == new)
        for old, new in zip(known, given, strict=True)
    )


def _code(word: Word) -> str:
    return "d" if isinstance(word, float) else "q"


def _values(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)

"""Folds the scalars of a capturable bucket on its device, by one Triton launch."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...extension import native
from ..buckets import Bucket
from .group_records import GroupRecords


class Folder:
    """What the fold kernel reads and writes; captured graphs use the memory, too.

    Args:
        bucket: a capturable bucket.

    Attributes:
        table: a row a slot: the rule's scalars, a weight per average and, where the step takes
            random bits, its seed; float64.
        num_words: how many the kernel reads.
        kept: its memory on the device.
    """

    def __init__(self, bucket: Bucket) -> None:
        from ...kernels.fold import launcher

        key, rule, device = bucket.key, bucket.rule, bucket.key.device
        self._groups = GroupRecords(bucket)
        sizes = self._groups.sizes
        group_of = torch.tensor(
            [index for index, size in enumerate(sizes) for _ in range(size)],
            dtype=torch.int32,
            device=device,
        )
        arrivals = torch.zeros(len(sizes), dtype=torch.int32, device=device)
        width = len(rule.scalars._fields) + len(key.emas) + key.rounds
        self.num_words = len(sizes) * self._groups.size + len(group_of)
        self.table = torch.zeros(len(group_of), width, dtype=torch.float64, device=device)
        self.kept = [group_of, arrivals, self.table]
        self._launch = launcher(
            rule=rule.name,
            num_numbers=self._groups.num_numbers,
            num_scalars=len(rule.scalars._fields),
            num_averages=len(key.emas),
            rounds=key.rounds,
            num_groups=len(sizes),
            group_of=group_of,
            table=self.table,
            arrivals=arrivals,
        )
        self._records = b""

    def prepare(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """As :meth:`GroupRecords.read`."""
        self._records = self._groups.read(groups)

    def words(self, slots: native.Slots) -> bytes:
        """What the kernel reads at the prepared step."""
        counters = slots.counters
        return self._records + struct.pack(f"={len(counters)}q", *counters)

    def run(self, words: Tensor, control: Tensor) -> None:
        """Count the prepared step and fold :attr:`table`, by one launch."""
        self._launch(words=words, control=control)

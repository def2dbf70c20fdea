"""Triton kernels: one launch per bucket, whatever the number of tensors and param groups."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ...ema import formats
from ...extension import native
from .. import layout
from ..buckets import Bucket
from ..gradients import Ending
from . import dense, graphs, streams
from .plan import Fold
from .triton_folder import Folder

NAME = "triton"


def unsupported(bucket: Bucket) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    from ...kernels.rules import RULES  # at their first use: importing them takes a while
    from ...kernels.step import interpreted

    device = bucket.key.device
    if device.type == "meta":
        return "device meta, which has no memory"
    if device.type == "cpu" and not interpreted():
        return "device cpu (supported: Triton's, and the CPU with TRITON_INTERPRET=1)"
    if device.type != "cpu" and interpreted():
        return f"device {device} (supported: cpu, because of TRITON_INTERPRET=1)"
    return dense.unsupported(bucket, RULES)


class DeviceMetadata(NamedTuple):
    """A bucket's words in device memory, see :class:`fused_ema._native.Slots`."""

    scalars: Tensor
    indices: Tensor
    grads: Tensor
    slots: Tensor
    folded: Tensor


class DeviceWords:
    """Keeps a bucket's words on its device by one asynchronous copy of what has changed.

    Args:
        slots: the bucket's.
        row_size: words of a row of scalars.
        device: where kernels read them.
        folder: of a capturable bucket, whose words come behind the others.

    Attributes:
        kept: host and device memory that captured graphs use.
    """

    def __init__(self, slots: native.Slots, device: torch.device, folder: Folder | None) -> None:
        self._slots = slots
        self._folder = folder
        self._folded = b""
        self._device = device
        self._words = torch.empty(0, dtype=torch.int64, device=device)
        self._metadata: tuple[int, DeviceMetadata] | None = None
        self._spare: Tensor | None = None
        self.kept: list[Tensor] = []

    @property
    def device_words(self) -> Tensor:
        """What is on the device now, to be overwritten or dropped by an upload."""
        return self._words

    def current(self) -> DeviceMetadata:
        """Upload what has changed."""
        total, count = self._total, self._slots.num_changed
        if total > len(self._words):
            self._words = torch.empty(total, dtype=torch.int64, device=self._device)
            self._metadata, count, self._folded = None, self._slots.num_words, b""
        folded = self._folder.words(self._slots) if self._folder is not None else b""
        if folded != self._folded:
            self._folded, count = folded, total
        if count > 0:
            self._words[:count].copy_(self._packed(self._pinned(count)), non_blocking=True)
        if self._spare is None or len(self._spare) < total:
            self._spare = self._pinned(total)  # a capture must not allocate pinned memory
        num_rows = self._slots.num_rows
        if self._metadata is None or self._metadata[0] != num_rows:
            self._metadata = num_rows, self._split(self._words)
        return self._metadata[1]

    def captured(self) -> DeviceMetadata:
        """Upload everything, by a copy that a graph repeats from memory that nobody else uses."""
        total = self._total
        host = self._spare
        if host is None or len(host) < total:
            host = self._pinned(total)
        self._folded = self._folder.words(self._slots) if self._folder is not None else b""
        words = self._packed(host).to(self._device, non_blocking=True, copy=True)
        self.kept += [host, words]
        self._spare = None
        # what was packed is not in the other memory
        self._words, self._metadata = self._words[:0], None
        return self._split(words)

    def _pinned(self, count: int) -> Tensor:
        pin = self._device.type != "cpu"
        return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=pin)

    @property
    def _total(self) -> int:
        return self._slots.num_words + (0 if self._folder is None else self._folder.num_words)

    def _packed(self, host: Tensor) -> Tensor:
        self._slots.pack(host)
        begin = self._slots.num_words
        if len(host) > begin:
            ctypes.memmove(host.data_ptr() + 8 * begin, self._folded, len(self._folded))
        return host

    def _split(self, words: Tensor) -> DeviceMetadata:
        indices, grads, slots = self._slots.word_layout
        end = self._slots.num_words
        return DeviceMetadata(
            words[:indices].view(torch.float64),
            words[indices:grads].view(torch.int16),
            words[grads:slots],
            words[slots:end],
            words[end:],
        )


class Trust:
    """Takes the trust ratios of a bucket's step, by one launch.

    Args:
        bucket: of a rule that takes norms.
        slot: where a slot's words lie.
        chunks: see :func:`~fused_ema.kernels.step.launcher`.

    Attributes:
        ratios: one a slot, float64.
        kept: its memory on the device.
    """

    def __init__(self, bucket: Bucket, slot: layout.SlotLayout, chunks: Tensor) -> None:
        from ...kernels.trust import launcher

        key, num_scalars = bucket.key, len(bucket.rule.scalars._fields)
        count, device = len(bucket.slots), chunks.device
        self.ratios = torch.ones(count, dtype=torch.float64, device=device)
        sums = torch.zeros(2 * len(chunks), dtype=torch.float64, device=device)
        arrivals = torch.zeros(count, dtype=torch.int32, device=device)
        self.kept = [self.ratios, sums, arrivals]
        self._launch = launcher(
            rule=bucket.rule.name,
            dtype=key.dtype,
            master=key.master,
            rounded_states=key.state_format != "full",
            num_scalars=num_scalars,
            row_size=num_scalars + len(key.emas) + key.rounds,
            slot=slot,
            chunks=chunks,
            ratios=self.ratios,
            sums=sums,
            arrivals=arrivals,
        )

    def __call__(self, **metadata: Tensor) -> Tensor:
        """Take the ratios of the step that is launched with the same metadata."""
        self._launch(**metadata)
        return self.ratios


class TritonPlan:
    """A bucket stepped by one launch, after one for trust ratios if its rule takes norms."""

    def __init__(self, bucket: Bucket) -> None:
        from ...kernels.squares import Squares
        from ...kernels.step import launcher
        from ...kernels.tuning import CHUNK

        key, scalars = bucket.key, bucket.rule.scalars._fields
        self._device = key.device
        self._folder = Folder(bucket) if key.capturable else None
        self._slots = dense.slots(bucket)
        self._words = DeviceWords(self._slots, key.device, self._folder)
        self._control = torch.tensor([1.0, 0.0], dtype=torch.float64, device=key.device)
        self._chunks = chunks = self._slots.chunks(CHUNK).to(key.device)
        self._readers = streams.Readers(key.device)
        slot = layout.SlotLayout(*self._slots.slot_layout)
        self._squares = Squares(key.dtype, slot.size, chunks)
        self._ticket: Tensor = self._squares.ticket
        self.num_sums: int = self._squares.num_sums
        self._launch = launcher(
            rule=bucket.rule.name,
            variant=key.variant,
            dtype=key.dtype,
            num_scalars=len(scalars),
            master=key.master,
            rounded_states=key.state_format != "full",
            average=formats.DTYPES.get(key.ema_format),
            slot=slot,
            ema_before=key.ema_order == "before",
            chunks=chunks,
        )
        self._trust = Trust(bucket, slot, chunks) if bucket.rule.takes_norms else None
        self._metadata: DeviceMetadata | None = None

    @property
    def captured(self) -> bool:
        return bool(self._words.kept)

    @property
    def skipping(self) -> native.Slots:
        return self._slots

    def prepare(self, fold: Fold) -> bool:
        self._metadata = None
        if self._folder is not None:
            self._folder.prepare(fold.groups)
        return self._slots.prepare(fold)

    def release(self) -> None:
        self._slots.release()

    def _kept(self) -> list[Tensor]:
        folding = [] if self._folder is None else self._folder.kept
        trust = [] if self._trust is None else self._trust.kept
        mine = [self._chunks, self._control, self._ticket, self._words.device_words]
        return [*mine, *folding, *trust]

    def norm(self, partial_sums: Tensor | None, ending: Ending | None) -> None:
        self._readers.enter(self._kept)
        if partial_sums is None:
            self._squares(grads=None, slots=None, partial_sums=None, ending=ending)
            return
        self._slots.begin_gradients()
        with self._slots.hold():  # another thread may run until the launch
            metadata = self._uploaded(graphs.is_capturing(self._device))
            self._squares(
                grads=metadata.grads, slots=metadata.slots, partial_sums=partial_sums, ending=ending
            )

    def run(self, control: Tensor | None) -> None:
        self._readers.enter(self._kept)
        self._slots.begin()
        with self._slots.hold():
            self._run(control)
            self._slots.advance()

    def _run(self, control: Tensor | None) -> None:
        metadata = self._uploaded(graphs.is_capturing(self._device))
        control = self._control if control is None else control
        scalars = metadata.scalars
        if self._folder is not None:
            self._folder.run(metadata.folded, control)
            scalars = self._folder.table
        given = {
            "control": control,
            "scalars": scalars,
            "indices": metadata.indices,
            "grads": metadata.grads,
            "slots": metadata.slots,
        }
        ratios = None if self._trust is None else self._trust(**given)
        self._launch(**given, ratios=ratios)

    def _uploaded(self, capturing: bool) -> DeviceMetadata:
        """The bucket's words on the device: once a step, unless an address has changed since."""
        if self._metadata is None or self._slots.num_changed > 0:
            self._metadata = self._words.captured() if capturing else self._words.current()
        return self._metadata


def plan(bucket: Bucket) -> TritonPlan:
    return TritonPlan(bucket)

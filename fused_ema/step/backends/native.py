"""The C++ kernels: one native call per bucket and step, pointers read there each time."""

from __future__ import annotations

from torch import Tensor

from ...extension import cuda, native, why_no_cuda, why_not
from ..buckets import Bucket
from ..gradients import Ending
from . import coverage, dense, triton
from .group_records import GroupRecords
from .plan import Fold, Plan

NAME = "native"


def unsupported(bucket: Bucket) -> str | None:
    device = bucket.key.device
    if why_not is not None:
        return f"it needs the compiled extension: {why_not}"
    if device.type not in ("cpu", "cuda"):
        return f"device {device} (supported: cpu, cuda)"
    if device.type == "cuda" and why_no_cuda is not None:
        return f"device {device}, without the CUDA kernels: {why_no_cuda}"
    if device.type == "cpu" and bucket.key.capturable:
        return "capturable=True: it folds the scalars on the host"
    reason = dense.unsupported(bucket, native.rule_variants())
    return _uncovered(bucket) if reason is None and device.type == "cuda" else reason


def _uncovered(bucket: Bucket) -> str | None:
    """Why the CUDA kernels should not run on the bucket's GPU; "auto" warns of it once."""
    device, auto = bucket.key.device, bucket.key.backend == "auto"
    code = coverage.code_for(device)
    # compiling PTX is worth the wait where Triton, which compiles one kernel, cannot do instead
    spared = auto and triton.unsupported(bucket) is None
    if code == "machine code" or (code == "PTX" and not spared):
        return None
    why = coverage.lacking(device)
    if auto:
        coverage.warn_once(f"fused_ema: backend='auto' goes on without native: {why}")
    return why


class CapturablePlan:
    """A bucket on a GPU whose scalars are folded there."""

    def __init__(self, bucket: Bucket) -> None:
        self._groups = GroupRecords(bucket)
        self._slots = dense.slots(bucket, cuda.Slots)
        self._plan = cuda.CudaPlan(*kernel_of(bucket), self._slots, is_before(bucket))
        self._records = b""

    @property
    def captured(self) -> bool:
        return self._plan.captured

    @property
    def skipping(self) -> native.Slots:
        return self._slots

    def prepare(self, fold: Fold) -> bool:
        self._records = self._groups.read(fold.groups)
        return self._plan.prepare(fold)

    def release(self) -> None:
        self._plan.release()

    @property
    def num_sums(self) -> int:
        return self._plan.num_sums

    def norm(self, partial_sums: Tensor | None, ending: Ending | None) -> None:
        self._plan.norm(partial_sums, ending)

    def run(self, control: Tensor | None) -> None:
        self._plan.run(control, self._records)


def kernel_of(bucket: Bucket) -> tuple[str, str]:
    """The names of the bucket's rule and of its variant."""
    return bucket.rule.name, bucket.key.variant


def is_before(bucket: Bucket) -> bool:
    return bucket.key.ema_order == "before"


def cuda_plan(bucket: Bucket) -> Plan:
    if bucket.key.capturable:
        return CapturablePlan(bucket)
    slots = dense.slots(bucket, cuda.Slots)
    return cuda.CudaPlan(*kernel_of(bucket), slots, is_before(bucket))


def plan(bucket: Bucket) -> Plan:
    if bucket.key.device.type == "cuda":
        return cuda_plan(bucket)
    return native.Plan(*kernel_of(bucket), dense.slots(bucket), is_before(bucket))

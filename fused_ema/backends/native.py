"""The C++ kernels: one native call per bucket and step, pointers read there each time."""

from __future__ import annotations

from .. import _native
from ..buckets import Bucket
from . import dense, graphs
from .plan import Fold, Plan

NAME = "native"


def unsupported(bucket: Bucket) -> str | None:
    device = bucket.key.device
    if device.type not in ("cpu", "cuda"):
        return f"device {device} (supported: cpu, cuda)"
    if device.type == "cuda" and not _native.HAS_CUDA:
        return f"device {device} (built without CUDA, see fused_ema.build_info())"
    if device.type == "cpu" and bucket.key.capturable:
        return "capturable=True: it folds the scalars on the host"
    return dense.unsupported(bucket, _native.rule_scalars())


class CapturablePlan:
    """A bucket on a GPU whose scalars are folded there."""

    def __init__(self, bucket: Bucket) -> None:
        self._device = bucket.key.device
        self._folder = graphs.device_folder(bucket)
        self._plan = cuda_plan(bucket)

    @property
    def captured(self) -> bool:
        return self._plan.captured

    def prepare(self, fold: Fold) -> bool:
        self._groups = fold.groups
        return self._plan.prepare(fold)

    def run(self) -> None:
        capturing = graphs.is_capturing(self._device)
        self._folder.run(self._groups, self._plan.active, capturing)
        self._plan.run(self._folder.table)


def cuda_plan(bucket: Bucket) -> _native.CudaPlan:
    return _native.CudaPlan(
        rule=bucket.rule.name,
        capturable=bucket.key.capturable,
        ema_before=bucket.key.ema_order == "before",
        **dense.columns(bucket),
    )


def plan(bucket: Bucket) -> Plan:
    if bucket.key.device.type == "cuda":
        return CapturablePlan(bucket) if bucket.key.capturable else cuda_plan(bucket)
    before = bucket.key.ema_order == "before"
    return _native.Plan(rule=bucket.rule.name, ema_before=before, **dense.columns(bucket))

"""The C++ kernels: one native call per bucket and step, pointers read there each time."""

from __future__ import annotations

import torch

from .. import _native
from ..buckets import Bucket

NAME = "native"

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unsupported(bucket: Bucket) -> str | None:
    key = bucket.key
    if bucket.rule.name not in _native.rule_scalars():
        return f"no kernel for rule {bucket.rule.name!r}"
    if key.device.type != "cpu":
        return f"device {key.device} (supported: cpu)"
    if key.dtype not in DTYPES:
        return f"dtype {key.dtype} (supported: {', '.join(map(str, DTYPES))})"
    if key.layout != "dense":
        return "memory with gaps, overlaps or differing strides, or tensor subclasses"
    if key.differentiable:
        return "differentiable=True needs the reference backend"
    return None


def plan(bucket: Bucket) -> _native.Plan:
    return _native.Plan(
        rule=bucket.rule.name if bucket.key.states is not None else "frozen",
        params=[slot.param for slot in bucket.slots],
        steps=[slot.state["step"] for slot in bucket.slots],
        states=[[slot.state[key] for key in bucket.state_keys] for slot in bucket.slots],
        emas=[[slot.state[key] for key in bucket.key.emas] for slot in bucket.slots],
        groups=[slot.group for slot in bucket.slots],
        ema_before=bucket.key.ema_order == "before",
    )

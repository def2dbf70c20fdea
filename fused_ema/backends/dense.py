"""What the backends with kernels of their own share: which buckets they take, and the slots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..buckets import Bucket

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unsupported(bucket: Bucket, rules: Iterable[str]) -> str | None:
    """Why no kernel that knows ``rules`` can run the bucket, whatever its device."""
    key = bucket.key
    if bucket.rule.name not in rules:
        return f"no kernel for rule {bucket.rule.name!r}"
    if key.dtype not in DTYPES:
        return f"dtype {key.dtype} (supported: {', '.join(map(str, DTYPES))})"
    if key.layout != "dense":
        return "memory with gaps, overlaps or differing strides, or tensor subclasses"
    if key.differentiable:
        return "differentiable=True needs the reference backend"
    return None


def columns(bucket: Bucket) -> dict[str, list[Any]]:
    """The bucket's tensors by their part in a step, for the native module."""
    slots = bucket.slots
    return {
        "params": [slot.param for slot in slots],
        "steps": [slot.state["step"] for slot in slots],
        "states": [[slot.state[key] for key in bucket.state_keys] for slot in slots],
        "emas": [[slot.state[key] for key in bucket.key.emas] for slot in slots],
        "groups": [slot.group for slot in slots],
    }

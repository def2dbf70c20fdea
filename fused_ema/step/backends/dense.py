"""What the backends with kernels of their own share: which buckets they take, and the slots."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ...extension import native, why_not
from ...sharding import local
from ..buckets import Bucket
from . import words

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unsupported(bucket: Bucket, known: Mapping[str, Container[str]]) -> str | None:
    """Why no kernel can run the bucket, whatever its device; ``known`` are rules' variants."""
    key = bucket.key
    modes = [type(mode).__name__ for mode in _get_current_dispatch_mode_stack()]
    if modes:
        return f"{', '.join(modes)} would not see it: modes see operations of torch's alone"
    if key.variant not in known.get(bucket.rule.name, ()):
        return f"no kernel for rule {bucket.rule.name!r}, variant {key.variant!r}"
    if key.dtype not in DTYPES:
        return f"dtype {key.dtype} (supported: {', '.join(map(str, DTYPES))})"
    if key.layout != "dense":
        return "memory with gaps, overlaps or differing strides, or tensor subclasses"
    if key.differentiable:
        return "differentiable=True needs the reference backend"
    return None


def slots(bucket: Bucket, kind: type[native.Slots] | None = None) -> native.Slots:
    """The bucket's tensors, for an extension or its substitute to read at every step.

    ``kind`` is that of another extension than the CPU's.
    """
    key, members = bucket.key, bucket.slots
    made: Any = kind or (native.Slots if why_not is None else words.Slots)
    slots: native.Slots = made(
        num_scalars=len(bucket.rule.scalars._fields),
        frozen=key.frozen,
        takes_grads=bucket.takes_grads,
        capturable=key.capturable,
        master=key.master,
        params=[local(slot.param) for slot in members],
        steps=[slot.state["step"] for slot in members],
        states=[[local(slot.state[name]) for name in bucket.state_keys] for slot in members],
        emas=[[local(slot.state[name]) for name in bucket.key.emas] for slot in members],
        groups=[slot.group for slot in members],
        param_indices=[slot.param_index for slot in members],
    )
    return slots

"""What the device backends share to be captured in a CUDA graph."""

from __future__ import annotations

import torch

from ..buckets import Bucket
from ..device_folding import DeviceFolder


def device_folder(bucket: Bucket) -> DeviceFolder:
    """Folds the bucket's scalars on its device; the slots' counters become parts of one tensor."""
    steps = torch.stack([slot.state["step"] for slot in bucket.slots])
    for slot, step in zip(bucket.slots, steps.unbind(), strict=True):
        slot.state["step"] = step
    groups = [slot.group for slot in bucket.slots]
    return DeviceFolder(bucket.rule, groups, len(bucket.key.emas), steps)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

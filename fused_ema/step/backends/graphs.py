"""What the device backends share to be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..buckets import Bucket
from ..device_folding import DeviceFolder


def device_folder(bucket: Bucket) -> DeviceFolder:
    """Folds the bucket's scalars on its device; the slots' counters become parts of a tensor."""
    groups = [slot.group for slot in bucket.slots]
    _gather_counters(bucket)
    counters = [slot.state["step"] for slot in bucket.slots]
    return DeviceFolder(
        bucket.rule, groups, len(bucket.key.emas), bucket.key.rounds, _stretches(counters)
    )


def _gather_counters(bucket: Bucket) -> None:
    """Put counters that lie alone into one tensor, and leave others where they are.

    A graph counts in memory that it knows, so that what was gathered once must not move.
    """
    alone = [slot for slot in bucket.slots if not _is_part(slot.state["step"])]
    if not alone:
        return
    # longer by one: of a single slot, too, a part is to be told from a counter of its own
    together = alone[0].state["step"].new_zeros(len(alone) + 1)
    for slot, place in zip(alone, together.unbind(), strict=False):
        slot.state["step"] = place.copy_(slot.state["step"])


def _is_part(counter: Tensor) -> bool:
    return counter.untyped_storage().nbytes() > counter.element_size()


def _stretches(counters: Sequence[Tensor]) -> list[Tensor]:
    """Counters as few tensors that share their memory: neighbours become one."""
    found: list[tuple[Tensor, int]] = []
    for counter in counters:
        first, size = found[-1] if found else (counter, 0)
        follows = counter.data_ptr() == first.data_ptr() + size * first.element_size()
        if size and follows and _memory(counter) == _memory(first):
            found[-1] = first, size + 1
        else:
            found.append((counter, 1))
    return [first.as_strided((size,), (1,)) for first, size in found]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

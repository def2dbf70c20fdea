"""The streams that read what a plan keeps on its device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Readers:
    """Tells torch's allocator of every stream that reads a plan's memory.

    Freed memory goes back to the stream that it was made on, which uses it anew at once, while
    another stream's kernel may still read it. Where the stream is that of the call before, this
    costs a comparison.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = current(device)

    def enter(self, kept: Callable[[], Iterable[Tensor]]) -> None:
        """Say that the current stream reads all that is kept; what is made from now on is its own.

        Args:
            kept: gives the tensors that kernels may read and that were made before.
        """
        stream = current(self._device)
        if stream is None or stream == self._stream:
            return
        for tensor in kept():
            tensor.record_stream(stream)
        self._stream = stream


def current(device: torch.device) -> torch.Stream | None:
    """The current stream of a device, None on the CPU, which has none."""
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)

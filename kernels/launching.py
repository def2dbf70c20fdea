"""Launches of kernels: by Triton's dispatch once, then of what it compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from .interpreter import float_errors_ignored


class Launch:
    """A kernel on a device with all but what is not specialized: pointers and numbers.

    The dispatch hashes the constants at every launch, which takes longer than the launch itself. So
    the kernel that it returns is kept, and launched with what the dispatch passes: on the device's
    current stream, between the hooks of whoever profiles. The interpreter returns none.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        device: torch.device,
        constants: Sequence[Any],
        options: Mapping[str, Any],
    ) -> None:
        self._kernel = kernel
        self._programs = programs
        self._device = device
        self._constants = tuple(constants)
        self._options = options
        self._run: Callable[..., None] | None = None

    def __call__(self, *given: Tensor | int | None) -> None:
        """Launch the programs, asynchronously; where there are none, nothing is.

        Every call gives the same types: a tensor of the same dtype, an int of as many bits, None.
        """
        if not self._programs:
            return
        with torch.accelerator.device_index(self._device.index):
            if self._run is None:
                self._dispatch(given)
            else:
                self._run(*given, *self._constants)

    def _dispatch(self, given: tuple[Tensor | int | None, ...]) -> None:
        grid = (self._programs, 1, 1)
        with float_errors_ignored():
            kernel = self._kernel[grid](*given, *self._constants, **self._options)
        if isinstance(kernel, CompiledKernel):
            self._run = kernel[grid]

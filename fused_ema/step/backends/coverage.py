"""Which GPUs the CUDA kernels were compiled for."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Literal

import torch

from ...extension import cuda


def code_for(device: torch.device) -> Literal["machine code", "PTX"] | None:
    """What the extension holds for a GPU.

    Machine code runs on GPUs of the same major version and the same or a later minor one. PTX is
    compiled by the driver when the kernels are loaded, for any later GPU.
    """
    major, minor = torch.cuda.get_device_capability(device)
    version = 100 * major + 10 * minor
    if any(version // 100 == arch // 100 and version >= arch for arch in cuda.CUDA_ARCHITECTURES):
        return "machine code"
    return "PTX" if any(version >= arch for arch in cuda.CUDA_PTX) else None


def lacking(device: torch.device) -> str:
    """A sentence about a GPU without machine code, with what to do."""
    major, minor = torch.cuda.get_device_capability(device)
    built = ", ".join(f"sm_{arch // 10}" for arch in cuda.CUDA_ARCHITECTURES)
    ptx = "; there is PTX, which takes long to compile" if code_for(device) == "PTX" else ""
    return (
        f"the CUDA kernels are compiled for {built}, not for device {device}, sm_{major}{minor}"
        f"{ptx}; rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


@cache
def warn_once(message: str) -> None:
    """Warn in this process once, whatever the filters."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)

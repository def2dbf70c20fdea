"""Reports what this copy of the library was built with and can run."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .extension import cuda, native, why_no_cuda, why_not


def build_info() -> dict[str, Any]:
    """Report what was built and what is in use, for bug reports and missing backends.

    Returns:
        ``torch`` and ``triton``: their versions, None if Triton is not installed; ``extension`` and
        ``cuda_extension``: ``"in use"``, or the reason why the compiled extension, or the one with
        the CUDA kernels, is not; ``cpu_targets``: the native CPU loops that this processor can run,
        the preferred one first; ``cuda``: None if the native CUDA kernels are not in use, else the
        compiler's ``version``, the ``architectures`` of the GPUs that they were compiled for, and
        ``ptx``: those that later GPUs can compile, when they load the kernels.
    """
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "extension": why_not or "in use",
        "cpu_targets": native.cpu_targets(),
        "cuda_extension": why_no_cuda or "in use",
        "cuda": _cuda() if why_no_cuda is None else None,
    }


def _cuda() -> dict[str, Any]:
    major, minor = divmod(cuda.CUDA_VERSION // 10, 100)
    return {
        "version": f"{major}.{minor}",
        "architectures": [f"sm_{arch // 10}" for arch in cuda.CUDA_ARCHITECTURES],
        "ptx": [f"compute_{arch // 10}" for arch in cuda.CUDA_PTX],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

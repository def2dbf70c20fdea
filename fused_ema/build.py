"""Reports what this copy of the library was built with and can run."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .extension import native, why_not


def build_info() -> dict[str, Any]:
    """Report what was built and what is in use, for bug reports and missing backends.

    Returns:
        ``torch`` and ``triton``: their versions, None if Triton is not installed; ``cpu_targets``:
        the native CPU loops that this processor can run, the preferred one first; ``cuda``: None if
        the native CUDA kernels were not built, else the compiler's ``version`` and the
        ``architectures`` of the GPUs that they were compiled for; ``extension``: ``"in use"``, or
        the reason why the compiled extension is not.
    """
    cuda = None
    if native.HAS_CUDA:
        major, minor = divmod(native.CUDA_VERSION // 10, 100)
        cuda = {
            "version": f"{major}.{minor}",
            "architectures": [f"sm_{arch // 10}" for arch in native.CUDA_ARCHITECTURES],
        }
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu_targets": native.cpu_targets(),
        "cuda": cuda,
        "extension": why_not or "in use",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""The CUDA plan and kernel, built as C++ for the CPU (tests/shim), as a backend of its own."""

from __future__ import annotations

from typing import Literal, get_args

from fused_ema import _native
from fused_ema.optim import base as optimizer
from fused_ema.step import backends as package
from fused_ema.step.backends import dense
from fused_ema.step.backends.native import cuda_plan as plan

__all__ = ["NAME", "plan", "unsupported"]

NAME = "shim"


def unsupported(bucket) -> str | None:
    return dense.unsupported(bucket, _native.rule_scalars())


def register() -> None:
    """Let `backend="shim"` be asked for; `"auto"` does not take it."""
    package.BACKENDS = (*package.BACKENDS, __import__(__name__))
    optimizer.BackendName = Literal[(*get_args(package.BackendName), NAME)]

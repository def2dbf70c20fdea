"""The CUDA plan and kernel, built as C++ for the CPU (tests/shim), as a backend of its own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from fused_ema.extension import cuda, native
from fused_ema.optim import base as optimizer
from fused_ema.step import backends as package
from fused_ema.step.backends import dense
from fused_ema.step.backends.native import cuda_plan as plan

__all__ = ["NAME", "captured", "plan", "unsupported"]

NAME = "shim"
# What setup.py builds it with, so that small tensors have several chunks.
CHUNK_BYTES = 1024


def unsupported(bucket) -> str | None:
    return dense.unsupported(bucket, native.rule_variants())


def register() -> None:
    """Let `backend="shim"` be asked for; `"auto"` does not take it."""
    package.BACKENDS = (*package.BACKENDS, __import__(__name__))
    optimizer.BackendName = Literal[(*get_args(package.BackendName), NAME)]


class FoldTask(ctypes.Structure):
    """As in csrc/cuda/fold.cuh."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("words", "group_of", "control", "table", "arrivals")
        ),
        *((name, ctypes.c_int) for name in ("num_groups", "num_slots", "num_emas")),
        ("rounds", ctypes.c_bool),
    )


def captured(launch: Callable[[], None]) -> list[Callable[[], None]]:
    """The kernels that ``launch`` launches, none of which runs: what a graph would repeat."""
    shim = ctypes.CDLL(cuda.__file__)
    begin = shim.shim_begin_capture()
    try:
        launch()
    finally:
        end = shim.shim_end_capture()
    return [partial(shim.shim_replay, k) for k in range(begin, end)]


def folded(launch: Callable[[], None], num_scalars: int) -> list[list[float]]:
    """The rows that the first kernel of ``launch`` folds."""
    shim = ctypes.CDLL(cuda.__file__)
    shim.shim_parameters.restype = ctypes.c_void_p
    first = shim.shim_num_launches()
    launch()
    task = FoldTask.from_address(shim.shim_parameters(first))
    width = num_scalars + task.num_emas + task.rounds
    values = (ctypes.c_double * (task.num_slots * width)).from_address(task.table)
    return [list(values[i * width : (i + 1) * width]) for i in range(task.num_slots)]

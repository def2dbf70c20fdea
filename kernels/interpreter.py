"""Triton's interpreter, which runs kernels on CPU tensors if TRITON_INTERPRET=1 at import.

Nothing here is used on a device. Beyond telling whether kernels are interpreted, this mends what
the interpreter gets wrong and keeps off what it is slow at.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import triton
import triton.language as tl

# The environment may change later, but every function is decorated for one or the other by then.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def interpreted() -> bool:
    """Whether kernels run on CPU tensors, and on those alone."""
    return bool(INTERPRETED)


def device(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``triton.jit`` for what kernels call.

    For each call of a jitted function the interpreter patches all of ``triton.language`` anew,
    which takes longer than most functions; a plain function it runs as well.
    """
    return fn if interpreted() else triton.jit(fn)


@device
def bound(value):
    """A bound of ``range``; not every version of the interpreter takes a scalar there."""
    if INTERPRETED:
        return int(value.handle.data.item())
    return value


def float_errors_ignored() -> AbstractContextManager[Any]:
    """Keeps numpy, which computes for the interpreter, from warning of infinities and NaNs."""
    if not interpreted():
        return nullcontext()
    import numpy as np

    return np.errstate(all="ignore")


def round_bfloat16() -> None:
    """Make conversions to bfloat16 round and those from it exact.

    The interpreter truncates, and does not know subnormals.
    """
    import numpy as np
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    convert_others = interpreter_builder.cast_impl

    def narrowed(values: np.ndarray) -> np.ndarray:
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)

    def widened(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def convert(source: TensorHandle, target: tl.dtype) -> TensorHandle:
        types = (source.dtype.scalar, target.scalar)
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(narrowed(source.data), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(source.data), tl.float32)
        return convert_others(source, target)

    interpreter_builder.cast_impl = convert


if interpreted():
    round_bfloat16()

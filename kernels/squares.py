"""The kernel that adds up the squares of gradients, before a step that clips their norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import device
from .launching import Launch
from .rules import is_finite
from .step import CHUNK, TYPES, block_size, launch_options, pointer


@device
def chunk_squares(
    grad,
    start,
    end,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Add squares up in BLOCK lanes, those of the elements from ``start`` to ``end`` of a chunk."""
    b_sum = tl.zeros((BLOCK,), COMPUTE)
    for i in tl.static_range(CHUNK // BLOCK):
        o_block = start + i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        p_grad = pointer(grad, o_block, STORED, WHOLE)
        if WHOLE:
            b_grad = tl.load(p_grad).to(COMPUTE)
        else:
            b_grad = tl.load(p_grad, o_block < end, other=0.0).to(COMPUTE)
        b_sum += b_grad * b_grad
    return b_sum


@triton.jit(do_not_specialize=["p_grads", "p_slots", "p_chunks", "p_sums"])
def squares_kernel(
    p_grads,
    p_slots,
    p_chunks,
    p_sums,
    SLOT_SIZE: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add up one chunk; :func:`squares` tells what the pointers point at."""
    p_chunk = p_chunks + 2 * tl.program_id(0).to(tl.int64)
    i_slot = tl.load(p_chunk).to(tl.int64)
    start = tl.load(p_chunk + 1).to(tl.int64) * CHUNK
    size = tl.load(p_slots + i_slot * SLOT_SIZE)
    grad = tl.load(p_grads + i_slot)
    end = tl.where(grad != 0, size, start)
    if (grad % 16 == 0) & (end - start >= CHUNK):
        b_sum = chunk_squares(grad, start, end, STORED, COMPUTE, BLOCK, CHUNK, True)
    else:
        b_sum = chunk_squares(grad, start, end, STORED, COMPUTE, BLOCK, CHUNK, False)
    total = tl.sum(b_sum.to(tl.float64), axis=0)
    if not is_finite(total):  # of what is too large for float32 to square
        b_wide = chunk_squares(grad, start, end, STORED, tl.float64, BLOCK, CHUNK, False)
        total = tl.sum(b_wide, axis=0)
    tl.store(p_sums + tl.program_id(0), total)


def squares_launch(dtype: torch.dtype, slot_size: int, chunks: Tensor) -> Launch:
    """Make the kernel that :func:`squares` launches.

    Args:
        dtype: of the gradients.
        slot_size: words of a slot.
        chunks: int32 pairs, slot and which CHUNK elements of it; every element is in one chunk.
    """
    stored, compute = TYPES[dtype]
    constants = (slot_size, stored, compute, block_size(compute), CHUNK)
    return Launch(squares_kernel, len(chunks), chunks.device, constants, launch_options())


def squares(launch: Launch, grads: Tensor, slots: Tensor, chunks: Tensor) -> Tensor:
    """Sums of squares of a bucket's gradients, asynchronously, on its device.

    Args:
        launch: of the kernel, see :func:`squares_launch`.
        grads: int64, the address of each slot's gradient, 0 for none.
        slots: int64, each slot's ``numel`` and more, see :func:`~fused_ema.kernels.step.launcher`.
        chunks: those that ``launch`` is for.

    Returns:
        float64, one sum a chunk: in the arithmetic's dtype within a chunk (in float64 where that
        overflows), in the same order on every device.
    """
    sums = torch.empty(len(chunks), dtype=torch.float64, device=chunks.device)
    launch(grads, slots, chunks, sums)
    return sums

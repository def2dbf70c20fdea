"""The kernel that takes trust ratios before a step that multiplies by them, and its launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blending import sqrt
from .interpreter import bound, device
from .launching import Launch
from .rules import TRUST
from .step import (
    TYPES,
    block_size,
    compile_options,
    dtypes,
    launch_options,
    load_each,
    pointer,
    rule_scalars,
)
from .tuning import CHUNK, THREADS

# Sums that a program adds up at a time.
WIDTH = THREADS


@device
def norms_of(
    MEASURED: tl.constexpr,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    slot,
    start,
    end,
):
    """Sums of squares of the weights from ``start`` to ``end``, and of what steps them.

    They are in BLOCK lanes of float64, so that hardly a bit of a ratio depends on the order.
    """
    param, grad, states, scalars = slot
    STORED: tl.constexpr = DTYPES[0]
    WEIGHT: tl.constexpr = DTYPES[1]
    STATE: tl.constexpr = DTYPES[2]
    COMPUTE: tl.constexpr = DTYPES[4]
    b_weights = tl.zeros((BLOCK,), tl.float64)
    b_steps = tl.zeros((BLOCK,), tl.float64)
    for i in range(bound(start), bound(end), BLOCK):
        o_block = i + tl.arange(0, BLOCK).to(tl.int64)
        m_block = None if WHOLE else o_block < end
        b_param = tl.load(pointer(param, o_block, WEIGHT, WHOLE), m_block).to(COMPUTE)
        b_grad = tl.load(pointer(grad, o_block, STORED, WHOLE), m_block).to(COMPUTE)
        p_states = [pointer(state, o_block, STATE, WHOLE) for state in states]
        b_states = [tl.load(p_state, m_block).to(COMPUTE) for p_state in p_states]
        b_weight = b_param.to(tl.float64)
        b_step = MEASURED(b_param, b_grad, b_states, scalars).to(tl.float64)
        if not WHOLE:
            b_weight = tl.where(m_block, b_weight, 0.0)
            b_step = tl.where(m_block, b_step, 0.0)
        b_weights += b_weight * b_weight
        b_steps += b_step * b_step
    return b_weights, b_steps


@device
def store_norms(
    MEASURED: tl.constexpr,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    slot,
    start,
    numel,
    p_sums,
):
    """Sum the chunk that begins at ``start``: whole blocks where all of it is there and aligned."""
    param, grad, states, _ = slot
    bits = param | grad
    for k in tl.static_range(len(states)):
        bits |= states[k]
    end = tl.minimum(start + CHUNK, numel)
    if (bits % 16 == 0) & (end - start == CHUNK):
        b_weights, b_steps = norms_of(MEASURED, DTYPES, BLOCK, True, slot, start, end)
    else:
        b_weights, b_steps = norms_of(MEASURED, DTYPES, BLOCK, False, slot, start, end)
    tl.store(p_sums, tl.sum(b_weights, axis=0))
    tl.store(p_sums + 1, tl.sum(b_steps, axis=0))


@device
def total(p_sums, count, WIDTH: tl.constexpr):
    """Every second of the sums that programs have written, added up in their order."""
    b_sum = tl.zeros((WIDTH,), tl.float64)
    o_width = tl.arange(0, WIDTH)
    for i in range(0, bound(count), WIDTH):
        o_sums = i + o_width
        # from the L2 cache, where other programs' sums are
        b_sum += tl.load(p_sums + 2 * o_sums, o_sums < count, other=0.0, cache_modifier=".cg")
    return tl.sum(b_sum, axis=0)


POINTERS = [
    *("p_control", "p_scalars", "p_indices", "p_grads", "p_slots", "p_chunks"),
    *("p_ratios", "p_sums", "p_arrivals"),
]


@triton.jit(do_not_specialize=POINTERS)
def trust_kernel(
    p_control,
    p_scalars,
    p_indices,
    p_grads,
    p_slots,
    p_chunks,
    p_ratios,
    p_sums,
    p_arrivals,
    MEASURED: tl.constexpr,
    RATIO: tl.constexpr,
    NUM_SCALARS: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    SLOT: tl.constexpr,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sum one chunk; the program that sums the last one of a slot makes the slot's ratio.

    The programs go from the last chunk to the first, so that the step finds in the L2 cache what
    has been read last.
    """
    if tl.load(p_control + 1) != 0.0:
        return
    i_chunk = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    i_slot = tl.load(p_chunks + 2 * i_chunk).to(tl.int64)
    i_part = tl.load(p_chunks + 2 * i_chunk + 1).to(tl.int64)
    NUMEL_AT: tl.constexpr = SLOT[0]
    WEIGHT_AT: tl.constexpr = SLOT[3]
    STATES_AT: tl.constexpr = SLOT[4]
    AVERAGES_AT: tl.constexpr = SLOT[5]
    SLOT_SIZE: tl.constexpr = SLOT[6]
    COMPUTE: tl.constexpr = DTYPES[4]
    p_slot = p_slots + i_slot * SLOT_SIZE
    numel = tl.load(p_slot + NUMEL_AT)
    grad = tl.load(p_grads + i_slot)
    i_row = tl.load(p_indices + i_slot).to(tl.int64) & 0xFFFF
    p_row = p_scalars + i_row * ROW_SIZE
    adapts = tl.load(p_row + NUM_SCALARS - 1) != 0.0
    if (grad != 0) & adapts:
        states = load_each(p_slot + STATES_AT, AVERAGES_AT - STATES_AT)
        scalars = rule_scalars(p_row, tl.load(p_control), p_row, COMPUTE, NUM_SCALARS, False)
        slot = (tl.load(p_slot + WEIGHT_AT), grad, states, scalars)
        start = i_part * CHUNK
        p_mine = p_sums + 2 * i_chunk
        store_norms(MEASURED, DTYPES, BLOCK, CHUNK, slot, start, numel, p_mine)
        count = (numel + CHUNK - 1) // CHUNK
        tl.debug_barrier()  # the sums come before the count, whichever threads write them
        if tl.atomic_add(p_arrivals + i_slot, 1, sem="acq_rel") == count - 1:
            tl.store(p_arrivals + i_slot, 0)
            p_first = p_sums + 2 * (i_chunk - i_part)
            weight = sqrt(total(p_first, count, WIDTH))
            step = sqrt(total(p_first + 1, count, WIDTH))
            row = rule_scalars(p_row, 1.0, p_row, tl.float64, NUM_SCALARS, False)
            tl.store(p_ratios + i_slot, RATIO(weight, step, row))
    elif i_part == 0:
        tl.store(p_ratios + i_slot, 1.0)


def launcher(
    rule: str,
    dtype: torch.dtype,
    master: bool,
    rounded_states: bool,
    num_scalars: int,
    row_size: int,
    slot: Sequence[int],
    chunks: Tensor,
    ratios: Tensor,
    sums: Tensor,
    arrivals: Tensor,
) -> Callable[..., None]:
    """Make what takes the trust ratios of a bucket's step, asynchronously, on its device.

    Args:
        rule: a key of :data:`~fused_ema.kernels.rules.TRUST`.
        dtype, master, rounded_states, num_scalars, slot, chunks: as those of
            :func:`~fused_ema.kernels.step.launcher`.
        row_size: of a row of scalars.
        ratios: float64, one a slot, which is written.
        sums: float64, two a chunk, which are written.
        arrivals: int32, one a slot, 0 before and after every launch.

    Returns:
        A function of what that of the step takes, without the ratios.
    """
    stored, compute = TYPES[dtype]
    constants = (
        *(*TRUST[rule], num_scalars, row_size, tuple(slot)),
        dtypes(stored, compute, master, rounded_states, None),
        *(block_size(compute), CHUNK, WIDTH),
    )
    take = Launch(
        trust_kernel, len(chunks), chunks.device, constants, launch_options(compile_options)
    )

    def launch(
        control: Tensor, scalars: Tensor, indices: Tensor, grads: Tensor, slots: Tensor
    ) -> None:
        take(control, scalars, indices, grads, slots, chunks, ratios, sums, arrivals)

    return launch

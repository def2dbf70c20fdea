"""The one kernel, which steps every parameter of a bucket and moves every average, and its launch.

Metadata lies in device memory, so that one launch takes any number of tensors. In names ``p_`` is a
pointer, ``b_`` a block of values, ``o_`` offsets, ``m_`` a mask, ``i_`` an index; what is in
capitals is known at compile time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .blending import ema, ema_delta, moved
from .interpreter import bound, device, interpreted
from .launching import Launch
from .rounding import (
    DELTA_SCALE,
    FIRST_STATE,
    chunk_key,
    random_bits,
    round_bfloat16,
    round_float16,
)
from .rules import RULES, TRUST, frozen
from .tuning import CHUNK, ELEMENTS, MAX_REGISTERS, THREADS

TYPES = {
    torch.float32: (tl.float32, tl.float32),
    torch.float64: (tl.float64, tl.float64),
    torch.bfloat16: (tl.bfloat16, tl.float32),
    torch.float16: (tl.float16, tl.float32),
}


def dtypes(
    stored: tl.dtype,
    compute: tl.dtype,
    master: bool,
    rounded_states: bool,
    average: torch.dtype | None,
) -> tuple[tl.dtype, ...]:
    """DTYPES: of parameters and gradients, weights, states and averages, and the arithmetic's."""
    weight = compute if master else stored
    state = tl.bfloat16 if rounded_states else weight
    return stored, weight, state, compute if average is None else TYPES[average][0], compute


def block_size(compute: tl.dtype) -> int:
    """Elements that a program takes at a time."""
    return THREADS * ELEMENTS[compute]


@device
def load_each(p_first, COUNT: tl.constexpr):
    """Load COUNT scalars."""
    values = ()
    for k in tl.static_range(COUNT):
        values += (tl.load(p_first + k),)
    return values


@device
def rule_scalars(
    p_row, factor, p_ratio, COMPUTE: tl.constexpr, COUNT: tl.constexpr, TRUSTS: tl.constexpr
):
    """Load a rule's scalars, of which the first multiplies gradients, as ``factor`` does.

    If the rule TRUSTS, the parameter's ratio takes the place of the last.
    """
    values = ()
    for k in tl.static_range(COUNT):
        value = tl.load(p_ratio if TRUSTS and k == COUNT - 1 else p_row + k)
        if k == 0:
            value *= factor
        values += (value.to(COMPUTE),)
    return values


@device
def pointer(address, o_block, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Point at a block of a tensor; WHOLE promises that its address is a multiple of 16 bytes."""
    p_first = address.to(tl.pointer_type(TYPE))
    if WHOLE:
        p_first = tl.multiple_of(p_first, 16)
    return p_first + o_block


@device
def stored_state(
    value,
    key,
    start,
    K: tl.constexpr,
    WEIGHT: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """State K as it is kept: as the weights, or rounded to fewer bits."""
    if STATE == WEIGHT:
        stored = value.to(STATE)
    else:
        stored = round_bfloat16(value, random_bits(key, FIRST_STATE + K, start, BLOCK))
    return stored


@device
def follow(
    average,
    old,
    new,
    rate,
    key,
    start,
    K: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Average K one step on, as it is kept: its dtype tells the format."""
    param = old if BEFORE else new
    if average.dtype == tl.bfloat16:
        followed = ema(average.to(tl.float32), param, rate)
        stored = round_bfloat16(followed, random_bits(key, K, start, BLOCK))
    elif average.dtype == tl.float16:
        change = moved(old, new) * DELTA_SCALE
        followed = ema_delta(average.to(tl.float32), change, rate, BEFORE)
        stored = round_float16(followed, random_bits(key, K, start, BLOCK))
    else:
        stored = ema(average, param, rate)
    return stored


@device
def step_block(
    RULE: tl.constexpr,
    EMA_BEFORE: tl.constexpr,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    slot,
    start,
    end,
):
    """Step a slot's elements from ``start`` on: BLOCK of them, unless ``end`` comes first."""
    STORED: tl.constexpr = DTYPES[0]
    WEIGHT: tl.constexpr = DTYPES[1]
    STATE: tl.constexpr = DTYPES[2]
    AVERAGE: tl.constexpr = DTYPES[3]
    COMPUTE: tl.constexpr = DTYPES[4]
    param, copy, grad, states, averages, scalars, ema_rates, key = slot
    # 64 bits, and the same for all tensors: a running pointer for each costs more registers
    o_block = start + tl.arange(0, BLOCK).to(tl.int64)
    m_block = None if WHOLE else o_block < end
    p_param = pointer(param, o_block, WEIGHT, WHOLE)
    # loads come before the first store, so that they are under way at once
    b_old = tl.load(p_param, m_block).to(COMPUTE)
    b_new = b_old
    FEW: tl.constexpr = len(states) < (3 if WEIGHT != STORED else 4)  # for the registers there are
    # differences move with both the old and the new parameter
    EARLY: tl.constexpr = len(averages) > 0 and COMPUTE.is_fp32() and FEW and not AVERAGE.is_fp16()
    if EARLY:
        p_average = pointer(averages[0], o_block, AVERAGE, WHOLE)
        b_average = tl.load(p_average, m_block)
    if RULE is not frozen:
        p_states = [pointer(state, o_block, STATE, WHOLE) for state in states]
        b_states = [tl.load(p_state, m_block).to(COMPUTE) for p_state in p_states]
        b_grad = tl.load(pointer(grad, o_block, STORED, WHOLE), m_block).to(COMPUTE)
        b_moved, b_states = RULE(b_old, b_grad, b_states, scalars)
        b_stored = b_moved.to(WEIGHT)
        tl.store(p_param, b_stored, m_block)
        if WEIGHT != STORED:
            tl.store(pointer(copy, o_block, STORED, WHOLE), b_moved.to(STORED), m_block)
        for k in tl.static_range(len(states)):
            b_state = stored_state(b_states[k], key, start, k, WEIGHT, STATE, BLOCK)
            tl.store(p_states[k], b_state, m_block)
        b_new = b_stored.to(COMPUTE)
    if EARLY:
        b_average = follow(b_average, b_old, b_new, ema_rates[0], key, start, 0, EMA_BEFORE, BLOCK)
        tl.store(p_average, b_average, m_block)
    # other averages wait: their values would take the registers of another program
    for k in tl.static_range(1 if EARLY else 0, len(averages)):
        p_average = pointer(averages[k], o_block, AVERAGE, WHOLE)
        b_average = tl.load(p_average, m_block)
        b_average = follow(b_average, b_old, b_new, ema_rates[k], key, start, k, EMA_BEFORE, BLOCK)
        tl.store(p_average, b_average, m_block)


@device
def step_slot(
    RULE: tl.constexpr,
    EMA_BEFORE: tl.constexpr,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
    slot,
    start,
    end,
):
    """Step a slot's elements from ``start`` to ``end``: whole blocks of aligned tensors first."""
    param, copy, grad, states, averages, _, _, _ = slot
    bits = param | copy | grad
    for k in tl.static_range(len(states)):
        bits |= states[k]
    for k in tl.static_range(len(averages)):
        bits |= averages[k]
    whole = tl.where(bits % 16 == 0, (end - start) // BLOCK * BLOCK, 0)
    first, tail, last = bound(start), bound(start + whole), bound(end)
    for i in range(first, tail, BLOCK):
        step_block(RULE, EMA_BEFORE, DTYPES, BLOCK, True, slot, i, end)
    # Of another size: blocks of the same one would be laid out over the threads alike, for the wide
    # accesses, and masked stores, which are narrow, would exchange elements between threads first.
    COMPUTE: tl.constexpr = DTYPES[4]
    TAIL: tl.constexpr = BLOCK // 2 if COMPUTE.is_fp32() else BLOCK
    for i in range(tail, last, TAIL):
        step_block(RULE, EMA_BEFORE, DTYPES, TAIL, False, slot, i, end)


POINTERS = ["p_control", "p_scalars", "p_indices", "p_grads", "p_slots", "p_chunks", "p_ratios"]


# The pointers are not specialized: they point into one buffer, at addresses of any alignment.
@triton.jit(do_not_specialize=POINTERS)
def step_kernel(
    p_control,
    p_scalars,
    p_indices,
    p_grads,
    p_slots,
    p_chunks,
    p_ratios,
    RULE: tl.constexpr,
    TRUSTS: tl.constexpr,
    NUM_SCALARS: tl.constexpr,
    SLOT: tl.constexpr,
    EMA_BEFORE: tl.constexpr,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Step one chunk; :func:`launcher` tells what the pointers point at, SLOT is its ``slot``."""
    if tl.load(p_control + 1) != 0.0:
        return
    p_chunk = p_chunks + 2 * tl.program_id(0).to(tl.int64)
    i_slot = tl.load(p_chunk).to(tl.int64)
    start = tl.load(p_chunk + 1).to(tl.int64) * CHUNK
    COMPUTE: tl.constexpr = DTYPES[4]
    ROUNDS: tl.constexpr = DTYPES[2] != DTYPES[1] or DTYPES[3] != COMPUTE
    NUMEL_AT: tl.constexpr = SLOT[0]
    INDEX_AT: tl.constexpr = SLOT[1]
    PARAM_AT: tl.constexpr = SLOT[2]
    WEIGHT_AT: tl.constexpr = SLOT[3]
    STATES_AT: tl.constexpr = SLOT[4]
    AVERAGES_AT: tl.constexpr = SLOT[5]
    SLOT_SIZE: tl.constexpr = SLOT[6]
    NUM_AVERAGES: tl.constexpr = SLOT_SIZE - AVERAGES_AT
    p_slot = p_slots + i_slot * SLOT_SIZE
    end = tl.minimum(start + CHUNK, tl.load(p_slot + NUMEL_AT))
    copy = tl.load(p_slot + PARAM_AT)
    param = tl.load(p_slot + WEIGHT_AT)
    averages = load_each(p_slot + AVERAGES_AT, NUM_AVERAGES)
    grad = tl.load(p_grads + i_slot)
    WIDTH: tl.constexpr = NUM_SCALARS + NUM_AVERAGES
    i_row = tl.load(p_indices + i_slot).to(tl.int64) & 0xFFFF
    p_row = p_scalars + i_row * (WIDTH + (1 if ROUNDS else 0))
    ema_rates = [w.to(COMPUTE) for w in load_each(p_row + NUM_SCALARS, NUM_AVERAGES)]
    key = chunk_key(tl.load(p_row + WIDTH), tl.load(p_slot + INDEX_AT), start) if ROUNDS else ()
    if grad != 0:
        states = load_each(p_slot + STATES_AT, AVERAGES_AT - STATES_AT)
        factor, p_ratio = tl.load(p_control), p_ratios + i_slot if TRUSTS else p_row
        scalars = rule_scalars(p_row, factor, p_ratio, COMPUTE, NUM_SCALARS, TRUSTS)
        moving = (param, copy, grad, states, averages, scalars, ema_rates, key)
        step_slot(RULE, EMA_BEFORE, DTYPES, BLOCK, moving, start, end)
    else:
        resting = (param, copy, grad, (), averages, (), ema_rates, key)
        step_slot(frozen, EMA_BEFORE, DTYPES, BLOCK, resting, start, end)


def compile_options(target: GPUTarget, bounded: bool = False) -> dict[str, Any]:
    """What kernels are compiled with; a product and a sum are rounded apart, as on the CPU.

    Args:
        target: what for.
        bounded: whether the kernel takes at most MAX_REGISTERS, where the compiler can be told.
    """
    options = {"num_warps": THREADS // target.warp_size, "enable_fp_fusion": False}
    return options | ({"maxnreg": MAX_REGISTERS} if bounded and target.backend == "cuda" else {})


@cache
def launch_options(make: Callable[..., dict[str, Any]], **how: Any) -> dict[str, Any]:
    """What ``make(target, **how)`` gives for this machine's devices, which are of one kind."""
    if interpreted():
        return {}
    return make(triton.runtime.driver.active.get_current_target(), **how)


def launcher(
    rule: str,
    variant: str,
    dtype: torch.dtype,
    master: bool,
    rounded_states: bool,
    average: torch.dtype | None,
    num_scalars: int,
    slot: Sequence[int],
    ema_before: bool,
    chunks: Tensor,
) -> Callable[..., None]:
    """Make what steps a bucket, asynchronously, on its device.

    Args:
        rule, variant: keys of :data:`RULES`.
        dtype: of parameters and gradients.
        master: whether parameters are copies of weights in the dtype of the arithmetic.
        rounded_states: whether states are in bfloat16, rounded stochastically, not as the weights.
        average: dtype of averages that are rounded stochastically: bfloat16, or float16 for
            differences to the weights; None: in that of the arithmetic.
        num_scalars: how many scalars the rule takes.
        slot: where a slot's words lie, see :class:`~fused_ema.step.layout.SlotLayout`.
        chunks: int32 pairs, slot and which CHUNK elements of it; every element is in one chunk.

    Returns:
        A function of what the kernel reads beside the chunks:

        control: float64, what gradients are multiplied by, and not 0 if nothing shall move.
        scalars: float64, rows of the rule's scalars and each average's EMA rate, then, where
            something is rounded stochastically, the seed of the step.
        indices: int16, each slot's row, without a sign.
        grads: int64, the address of each slot's gradient, 0 for none: then the averages alone move.
        slots: int64, laid out as ``slot`` says.
        ratios: float64, each slot's trust ratio; None for a rule that takes no norms.
    """
    stored, compute = TYPES[dtype]
    constants = (
        *(RULES[rule][variant], rule in TRUST, num_scalars, tuple(slot), ema_before),
        dtypes(stored, compute, master, rounded_states, average),
        *(block_size(compute), CHUNK),
    )
    options = launch_options(compile_options, bounded=True)
    step = Launch(step_kernel, len(chunks), chunks.device, constants, options)

    def launch(
        control: Tensor,
        scalars: Tensor,
        indices: Tensor,
        grads: Tensor,
        slots: Tensor,
        ratios: Tensor | None = None,
    ) -> None:
        step(control, scalars, indices, grads, slots, chunks, ratios)

    return launch

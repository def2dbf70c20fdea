"""The kernel that adds up the squares of gradients and ends with what a step makes of them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blending import is_finite, sqrt
from .interpreter import bound, device
from .launching import Launch
from .step import TYPES, block_size, compile_options, launch_options, pointer
from .tuning import CHUNK, THREADS

if TYPE_CHECKING:
    from ..step.gradients import Ending

# Enough to fill any GPU of today; not from the device, for the order of a sum makes its bits.
PROGRAMS = 2048
# Sums that a program adds up at a time.
WIDTH = 4 * THREADS
# As torch.nn.utils.clip_grad_norm_ adds to the norm, so that a norm of 0 divides.
EPS = tl.constexpr(1e-6)


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


@device
def squares_of(
    i_chunk,
    p_grads,
    p_slots,
    p_chunks,
    SLOT_SIZE: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add up one chunk."""
    p_chunk = p_chunks + 2 * i_chunk.to(tl.int64)
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
    return total


@device
def number(given):
    """A float64, from the bits of one or from where a number lies."""
    if given.dtype.is_ptr():
        value = tl.load(given).to(tl.float64)
    else:
        value = given.to(tl.int64).to(tl.float64, bitcast=True)
    return value


@device
def decide(
    squares, p_control, scale, found_inf, max_norm, CLIPS: tl.constexpr, CHECKS: tl.constexpr
):
    """Write what a step makes of its gradients; ``csrc/norm.h`` has the same formulas."""
    unscaling = 1.0 / number(scale)
    norm = sqrt(squares) * unscaling
    factor = unscaling
    if CLIPS:
        ratio = number(max_norm) / (norm + EPS)
        factor = tl.where(ratio > 1.0, 1.0, ratio) * unscaling  # a NaN stays one
    skipped = number(found_inf) != 0.0
    if CHECKS:
        skipped |= not is_finite(squares)
    flag = skipped.to(tl.float64)
    tl.store(p_control, factor)
    tl.store(p_control + 1, flag)
    tl.store(p_control + 2, norm)
    tl.store(p_control + 3, 1.0 - flag)
    tl.store(p_control + 4, squares)
    tl.store((p_control + 5).to(tl.pointer_type(tl.float32)), flag.to(tl.float32))


@triton.jit(
    do_not_specialize=[
        *("p_grads", "p_slots", "p_chunks", "num_chunks", "p_part", "p_ticket", "p_sums"),
        *("num_sums", "p_control", "scale", "found_inf", "max_norm"),
    ]
)
def squares_kernel(
    p_grads,
    p_slots,
    p_chunks,
    num_chunks,
    p_part,
    p_ticket,
    p_sums,
    num_sums,
    p_control,
    scale,
    found_inf,
    max_norm,
    ENDS: tl.constexpr,
    CLIPS: tl.constexpr,
    CHECKS: tl.constexpr,
    PASSES: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add up chunks from the last to the first; :func:`squares` tells what the pointers point at.

    The step goes the other way: it finds in the L2 cache what has been read last here. The program
    that is the last to come to the end adds up all sums and decides.
    """
    if PASSES:
        total = tl.full((), 0.0, tl.float64)
        for i in range(bound(tl.program_id(0)), bound(num_chunks), bound(tl.num_programs(0))):
            total += squares_of(
                num_chunks - 1 - i,
                p_grads,
                p_slots,
                p_chunks,
                SLOT_SIZE,
                STORED,
                COMPUTE,
                BLOCK,
                CHUNK,
            )
        tl.store(p_part + tl.program_id(0), total)
    if ENDS:
        tl.debug_barrier()  # the sum comes before the ticket, whichever threads write them
        if tl.atomic_add(p_ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.store(p_ticket, 0)
            b_sum = tl.zeros((WIDTH,), tl.float64)
            o_width = tl.arange(0, WIDTH)
            for i in range(0, bound(num_sums), WIDTH):
                # from the L2 cache, where other programs' sums are
                b_sum += tl.load(
                    p_sums + i + o_width, i + o_width < num_sums, other=0.0, cache_modifier=".cg"
                )
            decide(tl.sum(b_sum, axis=0), p_control, scale, found_inf, max_norm, CLIPS, CHECKS)


def num_sums(num_chunks: int) -> int:
    """Sums that a pass makes: the same on every device, as is the order they are added up in."""
    return min(max(num_chunks, 1), PROGRAMS)


class Squares:
    """Adds up the squares of a bucket's gradients, asynchronously, on its device.

    Args:
        dtype: of the gradients.
        slot_size: words of a slot.
        chunks: int32 pairs, slot and which CHUNK elements of it; every element is in one chunk.
    """

    def __init__(self, dtype: torch.dtype, slot_size: int, chunks: Tensor) -> None:
        stored, compute = TYPES[dtype]
        self._constants = (slot_size, stored, compute, block_size(compute), CHUNK, WIDTH)
        self._chunks = chunks
        self._launches: dict[tuple[Any, ...], Launch] = {}
        self.num_sums = num_sums(len(chunks))
        # 0 before and after every launch
        self.ticket = torch.zeros(1, dtype=torch.int32, device=chunks.device)

    def __call__(
        self,
        grads: Tensor | None,
        slots: Tensor | None,
        partial_sums: Tensor | None,
        ending: Ending | None,
    ) -> None:
        """Launch a pass, its end, or both.

        Args:
            grads: int64, the address of each slot's gradient, 0 for none.
            slots: int64, each slot's ``numel`` and more, see
                :func:`~fused_ema.kernels.step.launcher`.
            partial_sums: float64, ``num_sums`` of them, for the sums: in the arithmetic's dtype
                within a chunk (in float64 where that overflows). None: there is no pass, only its
                end.
            ending: of a pass that is the last of several; None: another one ends.
        """
        end: tuple[Any, ...] = (None, 0, None)
        numbers: list[Tensor | int] = [0, 0, 0]
        flags = (False, False, False)
        if ending is not None:
            numbers = [*map(_number, (ending.scale, ending.found_inf, ending.max_norm))]
            flags = (True, ending.clips, ending.checks)
            end = (ending.sums, len(ending.sums), ending.control)
        passes = partial_sums is not None
        key = (passes, *flags, *map(_kind, numbers))
        if key not in self._launches:
            programs = self.num_sums if passes else 1
            constants = (*flags, passes, *self._constants)
            self._launches[key] = Launch(
                squares_kernel,
                programs,
                self._chunks.device,
                constants,
                launch_options(compile_options),
            )
        launch = self._launches[key]
        launch(
            grads, slots, self._chunks, len(self._chunks), partial_sums, self.ticket, *end, *numbers
        )


def _number(given: Tensor | float) -> Tensor | int:
    """As the kernel takes it: what is passed as a float would be rounded to float32."""
    if isinstance(given, Tensor):
        return given
    bits: int = struct.unpack("<q", struct.pack("<d", given))[0]
    return bits


def _kind(number: Tensor | int) -> Any:
    """What a kernel is compiled for: a pointer's dtype, or whether 32 bits hold the integer."""
    if isinstance(number, Tensor):
        return number.dtype
    return -(2**31) <= number < 2**31

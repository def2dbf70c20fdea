"""The kernel that folds the scalars of a bucket's slots, a lane a slot, and its launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .interpreter import device
from .launching import Launch
from .rounding import mix
from .rules import FOLDS
from .scaling import decay_weight
from .schedules import cosine_decay, inverse_gamma_decay, power_decay, warm_up_decay
from .step import compile_options as step_options
from .step import launch_options

# Words of a param group before its numbers and of an average's decay, and what a decay's kind says;
# fused_ema/step/backends/group_records.py writes them.
HEAD = tl.constexpr(5)
# Bits beside the rule's flags: kappa drives the averages alone, or the optimizer alone.
EMA_ALONE = tl.constexpr(1 << 32)
OPTIMIZER_ALONE = tl.constexpr(1 << 33)
DECAY = tl.constexpr(4)
FIRST_SCHEDULE = tl.constexpr(16)
# A program is one warp, so that a slot has one thread, whose accesses keep their order.
SLOTS = 32


@device
def load_at(address, value, here, TYPE: tl.constexpr):
    """What lies at an address, where ``here``, else ``value``."""
    found = tl.load(address.to(tl.pointer_type(TYPE)), here, other=0)
    if TYPE.is_bf16():
        found = found.to(tl.float32)
    return tl.where(here, found.to(tl.float64), value)


@device
def number(kind, word, m_slot):
    """The number that a word stands for: itself, or what lies at an address."""
    value = word.to(tl.float64, bitcast=True)
    value = load_at(word, value, m_slot & (kind == 1), tl.float64)
    value = load_at(word, value, m_slot & (kind == 2), tl.float32)
    value = load_at(word, value, m_slot & (kind == 3), tl.float16)
    value = load_at(word, value, m_slot & (kind == 4), tl.bfloat16)
    value = load_at(word, value, m_slot & (kind == 5), tl.int64)
    return load_at(word, value, m_slot & (kind == 6), tl.int32)


@device
def number_at(p_group, kinds, K: tl.constexpr, m_slot):
    """Number K of a group, of the kind that its bits of ``kinds`` say."""
    word = tl.load(p_group + HEAD + K, m_slot, other=0)
    return number((kinds >> (4 * K)) & 15, word, m_slot)


@device
def is_met(condition):
    """Whether a condition holds in any lane."""
    return tl.max(condition.to(tl.int32), axis=0) != 0


@device
def ema_rate(p_decay, before, kappa, m_slot):
    """The EMA rate of an average, from the words of its decay."""
    kind = tl.load(p_decay, m_slot, other=0)
    word = tl.load(p_decay + 1, m_slot, other=0)
    first = word.to(tl.float64, bitcast=True)
    second = tl.load(p_decay + 2, m_slot, other=0).to(tl.float64, bitcast=True)
    third = tl.load(p_decay + 3, m_slot, other=0).to(tl.float64, bitcast=True)
    rho = number(tl.where(kind < FIRST_SCHEDULE, kind, 0), word, m_slot)
    if is_met(kind == FIRST_SCHEDULE):
        rho = tl.where(kind == FIRST_SCHEDULE, cosine_decay(first, second, before, kappa), rho)
    if is_met(kind == FIRST_SCHEDULE + 1):
        rho = tl.where(kind == FIRST_SCHEDULE + 1, warm_up_decay(first, before, kappa), rho)
    if is_met(kind == FIRST_SCHEDULE + 2):
        found = inverse_gamma_decay(first, second, third, before, kappa)
        rho = tl.where(kind == FIRST_SCHEDULE + 2, found, rho)
    if is_met(kind == FIRST_SCHEDULE + 3):
        rho = tl.where(kind == FIRST_SCHEDULE + 3, power_decay(first, before, kappa), rho)
    return decay_weight(rho, kappa)


@device
def step_seed(seed, base_steps):
    """The seed of the random bits of a step that begins at ``base_steps``."""
    bits = base_steps.to(tl.uint64, bitcast=True)
    return mix(mix(seed.to(tl.uint32) ^ bits.to(tl.uint32)) ^ (bits >> 32).to(tl.uint32))


@device
def arrive(p_arrivals, waiting, p_base_steps, after):
    """Count base steps when all slots of a group have read them: the last to arrive does."""
    m_waiting = waiting > 0
    before_it = tl.atomic_add(p_arrivals, 1, m_waiting)
    m_last = m_waiting & (before_it + 1 == waiting)
    tl.store(p_base_steps, after, m_last)
    tl.store(p_arrivals, 0, m_last)


@triton.jit(
    do_not_specialize=[
        "p_words",
        "p_group_of",
        "p_control",
        "p_table",
        "p_arrivals",
        "num_groups",
        "num_slots",
    ]
)
def fold_kernel(
    p_words,
    p_group_of,
    p_control,
    p_table,
    p_arrivals,
    num_groups,
    num_slots,
    FOLD: tl.constexpr,
    NUM_NUMBERS: tl.constexpr,
    NUM_SCALARS: tl.constexpr,
    NUM_AVERAGES: tl.constexpr,
    ROUNDS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Fold SLOTS slots; :func:`launcher` tells what the pointers point at."""
    if tl.load(p_control + 1) != 0.0:
        return
    i_slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    m_slot = i_slot < num_slots
    i_group = tl.load(p_group_of + i_slot, m_slot, other=0)
    GROUP: tl.constexpr = HEAD + NUM_NUMBERS + DECAY * NUM_AVERAGES
    counter = tl.load(p_words + num_groups * GROUP + i_slot, m_slot, other=0)
    p_group = p_words + i_group * GROUP
    kinds = tl.load(p_group + 4, m_slot, other=0)
    numbers = ()
    for k in tl.static_range(NUM_NUMBERS - 1):
        numbers += (number_at(p_group, kinds, k, m_slot),)
    kappa = number_at(p_group, kinds, NUM_NUMBERS - 1, m_slot)
    # what kappa does not drive goes on as at the base batch size
    flags = tl.load(p_group + 2, m_slot, other=0)
    advance = tl.where((flags & EMA_ALONE) != 0, 1.0, kappa)
    ema_kappa = tl.where((flags & OPTIMIZER_ALONE) != 0, 1.0, kappa)
    numbers += (advance,)
    p_before = tl.load(p_group, m_slot, other=0).to(tl.pointer_type(tl.float64))
    before = tl.load(p_before, m_slot, other=0.0)

    p_step = (counter & -2).to(tl.pointer_type(tl.float64))
    m_active = m_slot & ((counter & 1) != 0)
    step = tl.load(p_step, m_slot, other=0.0)
    step = tl.where(m_active, step + advance, step)
    tl.store(p_step, step, m_active)

    p_row = p_table + i_slot.to(tl.int64) * (NUM_SCALARS + NUM_AVERAGES + (1 if ROUNDS else 0))
    scalars = FOLD(numbers, flags, step)
    for k in tl.static_range(NUM_SCALARS):
        tl.store(p_row + k, scalars[k], m_slot)
    for k in range(NUM_AVERAGES):
        p_decay = p_group + HEAD + NUM_NUMBERS + DECAY * k
        rate = ema_rate(p_decay, before, ema_kappa, m_slot)
        tl.store(p_row + NUM_SCALARS + k, rate, m_slot)
    if ROUNDS:
        seed = step_seed(tl.load(p_group + 3, m_slot, other=0), before)
        tl.store(p_row + NUM_SCALARS + NUM_AVERAGES, seed.to(tl.float64), m_slot)

    arrive(p_arrivals + i_group, tl.load(p_group + 1, m_slot, other=0), p_before, before + kappa)


def compile_options(target: GPUTarget) -> dict[str, Any]:
    """What the kernel is compiled with."""
    return step_options(target) | {"num_warps": 1}


def launcher(
    rule: str,
    num_numbers: int,
    num_scalars: int,
    num_averages: int,
    rounds: bool,
    num_groups: int,
    group_of: Tensor,
    table: Tensor,
    arrivals: Tensor,
) -> Callable[..., None]:
    """What counts a step of every slot with a gradient and folds all scalars, asynchronously.

    Args:
        rule: key of :data:`~fused_ema.kernels.rules.FOLDS`.
        num_numbers: how many numbers the rule folds, ``kappa`` the last.
        num_scalars: how many scalars it takes.
        num_averages: of a slot.
        rounds: whether a row ends with the step's seed.
        num_groups: how many records there are.
        group_of: int32, which record is a slot's.
        table: float64, a row a slot, which is written.
        arrivals: int32, one a group, 0 between launches.

    Returns:
        A function of ``words``, int64, a record a group as ``GroupRecords`` has them, then for each
        slot the address of its float64 count, plus one where it has a gradient; and of ``control``,
        float64, of which the second number is not 0 if nothing shall move.
    """
    count = len(group_of)
    sizes = (num_groups, count)
    constants = (FOLDS[rule], num_numbers, num_scalars, num_averages, rounds, SLOTS)
    programs = -(-count // SLOTS)
    options = launch_options(compile_options)
    run = Launch(fold_kernel, programs, table.device, (*sizes, *constants), options)

    def launch(words: Tensor, control: Tensor) -> None:
        run(words, group_of, control, table, arrivals)

    return launch

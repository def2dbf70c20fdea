"""The Triton kernel, in Triton's interpreter, gives the native kernel's bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, product

import pytest
import torch
from cases import DTYPES
from optimizers import RULE_VARIANTS, SCALARS
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fused_ema import _native, rules
from fused_ema.ema import formats
from fused_ema.kernels import step, trust
from fused_ema.kernels.interpreter import interpreted
from fused_ema.kernels.rules import TRUST
from fused_ema.step import layout

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")

# There are weights on both sides of 1/2, where lerp changes its formula.
EMA_WEIGHTS = ((0.1, 0.0, 0.6), (1.0, 0.3, 1e-7), (0.8, 0.5, 0.01))
SEEDS = (0, 0xFFFFFFFF, 123456789)
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -2e-8, 7e-5, 6e4, -3e38)


@dataclass
class Slot:
    """A parameter with all that belongs to it; `row` is that of its scalars."""

    param: Tensor
    states: list[Tensor]
    averages: list[Tensor]
    row: int
    param_index: int

    def tensors(self) -> list[Tensor]:
        return [self.param, *self.states, *self.averages]


def draw(size: int, dtype: torch.dtype, generator: torch.Generator, shift: int) -> Tensor:
    """Ordinary numbers and others, `shift` elements into memory that ends one element later."""
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    chosen = torch.randint(8 * len(SPECIAL), (size,), generator=generator)
    for i, special in enumerate(SPECIAL):
        values[chosen == i] = special
    memory = torch.ones(shift + size + 1, dtype=dtype)
    return memory[shift:-1].copy_(values)


@dataclass(frozen=True)
class Variant:
    rule: str
    variant: str
    dtype: torch.dtype
    averages: int = 1
    ema_before: bool = False
    rounded_states: bool = False
    rounded_average: torch.dtype | None = None

    @property
    def states(self) -> int:
        """The number of the rule's states."""
        return len(rules.RULES[self.rule].variants[self.variant])

    @property
    def average_dtype(self) -> torch.dtype:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.rounded_average or wide

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.rounded_states else self.dtype

    def row(self, group: int) -> list[float]:
        """A group's scalars, weights and, where something is rounded by it, its seed."""
        rounds = self.rounded_states or self.rounded_average is not None
        weights = EMA_WEIGHTS[group][: self.averages]
        return [*SCALARS[self.rule][group], *weights, *([SEEDS[group]] if rounds else [])]

    @property
    def block(self) -> int:
        return step.block_size(step.TYPES[self.dtype][1])

    def slots(
        self, sizes: Sequence[int], active: Sequence[bool] = (True,), shifts: Sequence[int] = (0,)
    ) -> list[Slot]:
        """The same values at each call; `active` and `shifts` are used in turn."""
        generator = torch.Generator().manual_seed(0)
        turns, shift_turns, rows = cycle(active), cycle(shifts), cycle(range(len(EMA_WEIGHTS)))
        found = []
        for size in sizes:
            param, grad = (draw(size, self.dtype, generator, next(shift_turns)) for _ in "pg")
            states = [
                draw(size, self.state_dtype, generator, next(shift_turns))
                for _ in range(self.states)
            ]
            for squares in states[1:]:
                squares.abs_()
            averages = [
                draw(size, self.average_dtype, generator, next(shift_turns))
                for _ in range(self.averages)
            ]
            if next(turns) and self.rule != "frozen":
                param.grad = grad
            found.append(Slot(param, states, averages, next(rows), 3 * len(found) + 7))
        return found


@dataclass
class Table:
    """What a native plan takes its scalars from: group i has row i."""

    variant: Variant
    advances: Sequence[float] = (1.0,) * len(EMA_WEIGHTS)

    def __call__(self, group: int, step: float | None):
        scalars = () if step is None else SCALARS[self.variant.rule][group]
        return scalars, EMA_WEIGHTS[group][: self.variant.averages]

    def seed(self, group: int) -> int:
        return SEEDS[group]


def step_natively(variant: Variant, slots: list[Slot]) -> None:
    tensors = _native.Slots(
        num_scalars=len(SCALARS[variant.rule][0]),
        frozen=variant.rule == "frozen",
        takes_grads=True,
        capturable=False,
        master=False,
        params=[slot.param for slot in slots],
        steps=[torch.zeros((), dtype=torch.float64) for _ in slots],
        states=[slot.states for slot in slots],
        emas=[slot.averages for slot in slots],
        groups=[slot.row for slot in slots],
        param_indices=[slot.param_index for slot in slots],
    )
    plan = _native.Plan(variant.rule, variant.variant, tensors, variant.ema_before)
    assert plan.prepare(Table(variant))
    plan.run(None)


def words_of(slot: Slot) -> list[int]:
    return [slot.param.numel(), slot.param_index, *(tensor.data_ptr() for tensor in slot.tensors())]


def chunks_of(slots: list[Slot]) -> list[tuple[int, int]]:
    counts = [-(-slot.param.numel() // step.CHUNK) for slot in slots]
    return [(i, index) for i, count in enumerate(counts) for index in range(count)]


def packed_indices(rows: Sequence[int]) -> Tensor:
    padded = [*rows, *[0] * (-len(rows) % layout.INDICES_PER_WORD)]
    return torch.tensor(padded, dtype=torch.int16).view(torch.int64)


def launch(
    variant: Variant,
    rows: Sequence[int],
    grads: Sequence[int],
    words: Sequence[Sequence[int]],
    chunks: Sequence[tuple[int, int]],
) -> None:
    """Lays the metadata out in one buffer, as the backend does."""
    table = [variant.row(group) for group in range(len(EMA_WEIGHTS))]
    parts = [
        torch.tensor(table, dtype=torch.float64).view(-1).view(torch.int64),
        packed_indices(rows),
        torch.tensor(grads),
        torch.tensor(words).view(-1),
    ]
    buffer = torch.cat(parts)
    scalars, indices, *others = buffer.split([len(part) for part in parts])
    step_slots = step.launcher(
        variant.rule,
        variant.variant,
        variant.dtype,
        False,
        variant.rounded_states,
        variant.rounded_average,
        len(SCALARS[variant.rule][0]),
        layout.slot(False, variant.states, variant.averages),
        variant.ema_before,
        torch.tensor(chunks, dtype=torch.int32).view(-1, 2),
    )
    control = torch.tensor([1.0, 0.0], dtype=torch.float64)
    given = (control, scalars.view(torch.float64), indices.view(torch.int16), *others)
    ratios = None
    if variant.rule in TRUST:
        ratios = torch.ones(len(words), dtype=torch.float64)
        take_ratios(variant, chunks, ratios)(*given)
    step_slots(*given, ratios)


def take_ratios(variant: Variant, chunks: Sequence[tuple[int, int]], ratios: Tensor):
    num_scalars = len(SCALARS[variant.rule][0])
    return trust.launcher(
        variant.rule,
        variant.dtype,
        False,
        variant.rounded_states,
        num_scalars,
        len(variant.row(0)),
        layout.slot(False, variant.states, variant.averages),
        torch.tensor(chunks, dtype=torch.int32).view(-1, 2),
        ratios,
        torch.zeros(2 * len(chunks), dtype=torch.float64),
        torch.zeros(len(ratios), dtype=torch.int32),
    )


def step_interpreted(variant: Variant, slots: list[Slot]) -> None:
    launch(
        variant,
        [slot.row for slot in slots],
        [0 if slot.param.grad is None else slot.param.grad.data_ptr() for slot in slots],
        [words_of(slot) for slot in slots],
        chunks_of(slots),
    )


def bits(tensor: Tensor) -> Tensor:
    """The bits, those of the memory after it too; NaNs are alike, which one it is may vary."""
    values = tensor.as_strided((len(tensor) + 1,), (1,))
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return torch.where(values.isnan(), torch.tensor(-1, dtype=integer), values.view(integer))


def assert_same_bits(slots: list[Slot], others: list[Slot]) -> None:
    for slot, other in zip(slots, others, strict=True):
        for k, (a, b) in enumerate(zip(slot.tensors(), other.tensors(), strict=True)):
            assert torch.equal(bits(a), bits(b)), f"size {len(a)}, tensor {k} of its slot"


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("ema_before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("averages", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("rule", "kind"), RULE_VARIANTS)
def test_the_bits_are_those_of_the_native_kernel(rule, kind, dtype, averages, ema_before):
    variant = Variant(rule, kind, dtype, averages, ema_before)
    block = variant.block
    sizes = (0, 1, block - 1, block, block + 1, step.CHUNK + 3, 7, block + 2)
    active = (True, True, True, True, True, True, False, False)
    slots, others = variant.slots(sizes, active), variant.slots(sizes, active)
    step_natively(variant, slots)
    step_interpreted(variant, others)
    assert_same_bits(slots, others)


ROUNDING = [
    (rule, kind, dtype, rounded, average)
    for (rule, kind), dtype, rounded, average in product(
        RULE_VARIANTS,
        (torch.float32, torch.bfloat16),
        (False, True),
        (None, torch.bfloat16, torch.float16),
    )
    if rounded or average is not None
    if not rounded or (rules.RULES[rule].variants[kind] and dtype == torch.float32)
]


@pytest.mark.parametrize("ema_before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize(("rule", "kind", "dtype", "rounded", "average"), ROUNDING, ids=name_of)
def test_rounded_bits_are_the_native_ones(rule, kind, dtype, rounded, average, ema_before):
    variant = Variant(rule, kind, dtype, 2, ema_before, rounded, average)
    sizes = (1, variant.block + 1, step.CHUNK + 3, 7, variant.block + 2)
    active = (True, True, True, False, False)
    slots, others = variant.slots(sizes, active), variant.slots(sizes, active)
    step_natively(variant, slots)
    step_interpreted(variant, others)
    assert_same_bits(slots, others)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_alignment_does_not_change_a_bit(dtype):
    variant = Variant("adam", "amsgrad", dtype, averages=2)
    sizes = (1, variant.block, step.CHUNK + 3)
    aligned, others = variant.slots(sizes), variant.slots(sizes, shifts=(1, 0, 3))
    assert any(tensor.data_ptr() % 16 for slot in others for tensor in slot.tensors())
    step_interpreted(variant, aligned)
    step_interpreted(variant, others)
    assert_same_bits(aligned, others)


@pytest.fixture
def blocks(monkeypatch) -> list[tuple[bool, int]]:
    """For every block that is stepped: whether it is taken as whole and aligned, and its start."""
    taken = []

    def recorded(rule, ema_before, *types_and_place):
        *_, whole, _, start, _ = types_and_place
        taken.append((whole, start))
        return step_block(rule, ema_before, *types_and_place)

    step_block = step.step_block
    monkeypatch.setattr(step, "step_block", recorded)
    return taken


@pytest.mark.parametrize("active", [True, False], ids=["active", "resting"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_whole_blocks_of_aligned_tensors_are_not_masked(dtype, active, blocks):
    variant = Variant("adam", "amsgrad", dtype, averages=2)
    size = step.CHUNK + 2 * variant.block + 1
    step_interpreted(variant, variant.slots([size], [active]))
    whole = range(0, step.CHUNK + 2 * variant.block, variant.block)
    assert blocks == [*((True, start) for start in whole), (False, size - 1)]


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("odd", range(7))
def test_one_unaligned_tensor_masks_its_slot(odd, shift, blocks):
    variant = Variant("adam", "amsgrad", torch.float32, averages=2)
    shifts = [shift if k == odd else 0 for k in range(7)]
    step_interpreted(variant, variant.slots([variant.block], shifts=shifts))
    assert {whole for whole, _ in blocks} == {False}


@pytest.mark.parametrize("ema_before", [False, True], ids=["after", "before"])
def test_without_a_gradient_only_param_and_averages_are_touched(ema_before):
    variant = Variant("adam", "plain", torch.float32, 2, ema_before)
    (slot,), (other,) = variant.slots([9], [False]), variant.slots([9], [False])
    step_natively(variant, [slot])
    numel, place, param, _, _, *averages = words_of(other)
    launch(variant, [other.row], [0], [(numel, place, param, 0, 0, *averages)], [(0, 0)])
    assert_same_bits([slot], [other])


@pytest.mark.parametrize("active", [True, False], ids=["active", "resting"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_offsets_have_64_bits(dtype, active):
    variant = Variant("adam", "plain", dtype)
    near, far = variant.slots([step.CHUNK], [active]), variant.slots([step.CHUNK], [active])
    step_interpreted(variant, near)
    index = 2**32 // step.CHUNK + 5
    skipped = index * step.CHUNK
    (slot,) = far
    grad = slot.param.grad.data_ptr() - skipped * dtype.itemsize if active else 0
    starts = [tensor.data_ptr() - skipped * tensor.element_size() for tensor in slot.tensors()]
    words = (skipped + step.CHUNK, slot.param_index, *starts)
    launch(variant, [slot.row], [grad], [words], [(0, index)])
    assert_same_bits(near, far)


def test_random_bits_take_offsets_of_64_bits():
    """Values of the specification: no native tensor of so many elements is at hand."""
    variant = Variant("frozen", "plain", torch.float32, rounded_average=torch.bfloat16)
    ((slot,), (near,)) = variant.slots([step.CHUNK]), variant.slots([step.CHUNK])
    index = 2**32 // step.CHUNK + 5
    place = torch.arange(step.CHUNK) + index * step.CHUNK
    key = formats.mix(SEEDS[slot.row] ^ formats.mix(slot.param_index))
    hashed = formats.mix(key ^ (place & formats.MASK) >> 1 ^ formats.mix(place >> 32))
    bits = torch.where(place % 2 == 0, hashed & 0xFFFF, hashed >> 16)
    formats.follow(near.averages[0], near.param, EMA_WEIGHTS[near.row][0], bits)
    starts = [
        tensor.data_ptr() - index * step.CHUNK * tensor.element_size() for tensor in slot.tensors()
    ]
    words = ((index + 1) * step.CHUNK, slot.param_index, *starts)
    launch(variant, [slot.row], [0], [words], [(0, index)])
    assert_same_bits([slot], [near])


def test_without_chunks_nothing_is_launched(monkeypatch):
    monkeypatch.setattr(step, "step_kernel", None)
    variant = Variant("sgd", "plain", torch.float32)
    step_interpreted(variant, variant.slots([0, 0]))


def test_products_and_sums_are_rounded_apart():
    assert step.compile_options(GPUTarget("cuda", 80, 32))["enable_fp_fusion"] is False

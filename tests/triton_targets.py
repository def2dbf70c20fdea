"""Compiles the Triton kernel for devices that need not be here, and tells what became of it.

python tests/triton_targets.py            a table
python tests/triton_targets.py --json     a line of JSON for each row
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from optimizers import RULE_VARIANTS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_ema import rules
from fused_ema.kernels import fold, squares, step, trust
from fused_ema.kernels.rules import RULES, TRUST
from fused_ema.step import layout

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NUM_SCALARS = {name: len(rule.scalars._fields) for name, rule in rules.RULES.items()}
ARGUMENTS = ("*fp64", "*fp64", "*i16", "*i64", "*i64", "*i32", "*fp64")
SQUARES = "squares"  # the kernel that sums gradients' squares, which is no rule's
FOLD = "fold "  # what stands before the rule of a kernel that folds its scalars
TAKING = "trust "  # and before that of a kernel that takes its trust ratios
TAKING_ARGUMENTS = (*ARGUMENTS, "*fp64", "*i32")
FOLD_ARGUMENTS = ("*i64", "*i32", "*fp64", "*fp64", "*i32", "i32", "i32")
# Gradients, slots, chunks and how many, part, ticket; sums and how many, control; three numbers,
# two of which are a scaler's.
SQUARES_ARGUMENTS = (
    *("*i64", "*i64", "*i32", "i32", "*fp64", "*i32"),
    *("*fp64", "i32", "*fp64", "*fp32", "*fp32", "i64"),
)
WORKERS = 2


@dataclass(frozen=True)
class Variant:
    """What the kernel is specialized for."""

    rule: str
    variant: str = "plain"
    dtype: str = "float32"
    averages: int = 1
    ema_before: bool = False
    master: bool = False
    rounded_states: bool = False
    rounded_average: str | None = None

    @property
    def states(self) -> int:
        """The number of the rule's states."""
        rule = rules.RULES.get(self.rule.removeprefix(TAKING))
        return len(rule.variants[self.variant]) if rule else 0

    @property
    def types(self) -> tuple[tl.dtype, tl.dtype]:
        """The type of parameters and gradients, and that of the arithmetic."""
        return step.TYPES[getattr(torch, self.dtype)]

    @property
    def rounds(self) -> bool:
        return self.rounded_states or self.rounded_average is not None

    @property
    def dtypes(self) -> tuple[tl.dtype, ...]:
        average = getattr(torch, self.rounded_average) if self.rounded_average else None
        return step.dtypes(*self.types, self.master, self.rounded_states, average)

    @property
    def weight(self) -> tl.dtype:
        return self.dtypes[1]

    @property
    def state(self) -> tl.dtype:
        return self.dtypes[2]

    @property
    def average(self) -> tl.dtype:
        return self.dtypes[3]


DTYPES = ("float32", "float64", "bfloat16", "float16")
# Those that keep most.
LARGE = tuple(
    (name, variant)
    for name, variant in RULE_VARIANTS
    if len(rules.RULES[name].variants[variant]) > 1
)
VARIANTS = (
    *(Variant(*rule, dtype) for rule in RULE_VARIANTS for dtype in DTYPES),
    Variant("adam", averages=0),
    Variant("adam", averages=3),
    Variant("adam", ema_before=True),
    *(Variant(*rule, "bfloat16", master=True) for rule in LARGE),
    Variant("frozen", rounded_average="bfloat16"),
    *(
        Variant(*rule, dtype, 1, False, dtype != "float32", rounded, average)
        for rule in LARGE
        for dtype in ("float32", "bfloat16")
        for rounded, average in ((True, None), (False, "bfloat16"), (True, "float16"))
    ),
    *(
        Variant("adam", "plain", dtype, 2, False, dtype != "float32", True, "float16")
        for dtype in ("float32", "bfloat16")
    ),
    *(Variant(SQUARES, dtype=dtype, averages=0) for dtype in DTYPES),
)
RATIOS = tuple(
    Variant(f"{TAKING}{rule}", "plain", dtype, 1, False, master)
    for rule in TRUST
    for dtype, master in (*((dtype, False) for dtype in DTYPES), ("bfloat16", True))
)
FOLDS = tuple(
    Variant(f"{FOLD}{rule}", averages=2, rounded_average="bfloat16") for rule in rules.RULES
)


@dataclass(frozen=True)
class Row:
    """What the compiler made of a variant.

    registers: of a thread.
    occupancy: the part of a multiprocessor's threads that the registers leave room for.
    spilled: bytes that a thread keeps in memory for want of registers.
    shared: bytes of memory that a program's threads exchange values through.
    loads, stores: bits of each vector access, in ascending order.
    fused: multiplications and additions that are rounded once.
    divisions: correctly rounded ones.
    inexact: divisions and roots that are not, and what flushes subnormals.
    """

    target: str
    variant: Variant
    registers: int
    occupancy: float
    spilled: int
    shared: int
    loads: list[int]
    stores: list[int]
    fused: int
    divisions: int
    inexact: list[str]

    @classmethod
    def from_json(cls, line: str) -> Row:
        fields = json.loads(line)
        return cls(**fields | {"variant": Variant(**fields["variant"])})


def compile_kernel(variant: Variant, target: GPUTarget) -> triton.compiler.CompiledKernel:
    if variant.rule.startswith(FOLD):
        return compile_fold(variant, target)
    if variant.rule.startswith(TAKING):
        return compile_trust(variant, target)
    stored, compute = variant.types
    constants = (compute, step.block_size(compute), step.CHUNK)
    if variant.rule == SQUARES:
        kernel, pointers = squares.squares_kernel, SQUARES_ARGUMENTS
        # a pass that ends, clips and checks
        constants = (True, True, True, True, 2, stored, *constants, squares.WIDTH)
    else:
        kernel, pointers = step.step_kernel, ARGUMENTS
        rule = variant.rule
        scalars = (RULES[rule][variant.variant], rule in TRUST, NUM_SCALARS[rule])
        slot = layout.slot(variant.master, variant.states, variant.averages)
        kind = (*scalars, tuple(slot), variant.ema_before, variant.dtypes)
        constants = (*kind, *constants[1:])
    options = step.compile_options(target, bounded=variant.rule != SQUARES)
    return compiled(kernel, pointers, constants, target, options)


def compile_fold(variant: Variant, target: GPUTarget) -> triton.compiler.CompiledKernel:
    name = variant.rule.removeprefix(FOLD)
    sizes = (len(rules.RULES[name].number_names), NUM_SCALARS[name])
    constants = (fold.FOLDS[name], *sizes, variant.averages, variant.rounds, fold.SLOTS)
    options = fold.compile_options(target)
    return compiled(fold.fold_kernel, FOLD_ARGUMENTS, constants, target, options)


def compile_trust(variant: Variant, target: GPUTarget) -> triton.compiler.CompiledKernel:
    name = variant.rule.removeprefix(TAKING)
    count, (_, compute) = NUM_SCALARS[name], variant.types
    slot = layout.slot(variant.master, variant.states, variant.averages)
    kind = (*TRUST[name], count, count + variant.averages, tuple(slot), variant.dtypes)
    constants = (*kind, step.block_size(compute), step.CHUNK, trust.WIDTH)
    options = step.compile_options(target)
    return compiled(trust.trust_kernel, TAKING_ARGUMENTS, constants, target, options)


def compiled(
    kernel: Any,
    arguments: Sequence[str],
    constants: Sequence[Any],
    target: GPUTarget,
    options: dict[str, Any],
) -> triton.compiler.CompiledKernel:
    types = (*arguments, *("constexpr" for _ in constants))
    constexprs = {(len(arguments) + i,): value for i, value in enumerate(constants)}
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)), constexprs)
    return triton.compile(source, target=target, options=options)


def make_row(name: str, variant: Variant) -> Row:
    target = TARGETS[name]
    kernel = compile_kernel(variant, target)
    make = nvidia_row if target.backend == "cuda" else amd_row
    return make(name, variant, kernel)


def count(pattern: str, assembly: str) -> int:
    return len(re.findall(pattern, assembly))


def nvidia_row(name: str, variant: Variant, kernel: triton.compiler.CompiledKernel) -> Row:
    ptx = kernel.asm["ptx"]
    usage = resource_usage(kernel.asm["cubin"])
    return Row(
        target=name,
        variant=variant,
        registers=usage["REG"],
        occupancy=nvidia_occupancy(usage["REG"], kernel.metadata.num_warps),
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
        loads=nvidia_vectors("ld", ptx),
        stores=nvidia_vectors("st", ptx),
        fused=count(r"\b(?:fma|mad)\.(?:rn\.)?f", ptx),
        divisions=count(r"\bdiv\.rn\.f", ptx),
        inexact=re.findall(r"\b(?:div\.full|\w+\.approx|\w+(?:\.\w+)*\.ftz)[.\w]*", ptx),
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def nvidia_vectors(access: str, ptx: str) -> list[int]:
    found = re.findall(rf"\b{access}\.global(?:\.\w+)*?\.v(\d)\.b(\d+)", ptx)
    return sorted(int(length) * int(bits) for length, bits in found)


def nvidia_occupancy(registers: int, num_warps: int) -> float:
    """The share of 64 warps that fit: warps get registers in units of 256, out of 65536."""
    warps = 65536 // (-(-registers * 32 // 256) * 256)
    return min(warps // num_warps * num_warps, 64) / 64


def amd_row(name: str, variant: Variant, kernel: triton.compiler.CompiledKernel) -> Row:
    isa = kernel.asm["amdgcn"]
    used = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\n", isa)}
    return Row(
        target=name,
        variant=variant,
        registers=used["vgpr_count"],
        occupancy=amd_occupancy(used["vgpr_count"]),
        # scalar registers go to lanes of vector registers, which are counted, and not to memory
        spilled=used["private_segment_fixed_size"] + 4 * used["vgpr_spill_count"],
        shared=kernel.metadata.shared,
        loads=amd_vectors("load", isa),
        stores=amd_vectors("store", isa),
        fused=count(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_f", isa),
        divisions=count(r"\bv_div_fixup_f", isa),
        inexact=[],
    )


def amd_vectors(access: str, isa: str) -> list[int]:
    found = re.findall(rf"\b(?:global|flat|buffer)_{access}_dwordx(\d)", isa)
    return sorted(int(length) * 32 for length in found)


def amd_occupancy(registers: int) -> float:
    """The share of 8 waves that fit: waves get registers in units of 8, out of 512."""
    return min(512 // (-(-registers // 8) * 8), 8) / 8


def compile_all() -> Iterable[Row]:
    jobs = [(target, variant) for target in TARGETS for variant in (*VARIANTS, *RATIOS, *FOLDS)]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("fork")) as pool:
        yield from pool.map(make_row, *zip(*jobs, strict=True))


def print_table(rows: Iterable[Row]) -> None:
    form = "{:7} {:7} {:17} {:>7} {:16} {:>14} {:6} {:>9} {:>9} {:>7} {:>6}  {:26}  {:26}"
    names = (
        "target",
        "rule",
        "variant",
        "states",
        "dtype",
        "EMAs",
        "order",
        "registers",
        "occupancy",
    )
    print(form.format(*names, "spilled", "shared", "vector loads", "vector stores"))
    for row in rows:
        v = row.variant
        order = "before" if v.ema_before else "after"
        dtype = f"{v.dtype}, master" if v.master else v.dtype
        states = f"{v.states}, bf16" if v.rounded_states else v.states
        averages = f"{v.averages}, {v.average.name}" if v.rounded_average else v.averages
        cells = (row.target, v.rule, v.variant, states, dtype, averages, order, row.registers)
        accesses = (summary(row.loads), summary(row.stores))
        print(form.format(*cells, f"{row.occupancy:.0%}", row.spilled, row.shared, *accesses))


def summary(accesses: list[int]) -> str:
    return ", ".join(f"{n} of {bits} bit" for bits, n in Counter(accesses).items())


if __name__ == "__main__":
    if "--json" in sys.argv:
        for row in compile_all():
            print(json.dumps(asdict(row)), flush=True)
    else:
        print_table(compile_all())

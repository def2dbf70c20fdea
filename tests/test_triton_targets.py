"""What the compilers make of the Triton kernel, for devices that need not be here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import triton.language as tl
from optimizers import ADAPTIVE_RULES
from triton_targets import FOLDS, RATIOS, SQUARES, TARGETS, VARIANTS, Row, Variant

from fused_ema.kernels import step

# What a fixture makes once is made in one worker.
pytestmark = pytest.mark.xdist_group("triton targets")

# Smallest share of a multiprocessor's threads that a kernel may keep busy.
OCCUPANCY = 1 / 2
# Kernels with divisions and roots.
DIVIDING = {*ADAPTIVE_RULES, SQUARES}


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory) -> list[Row]:
    """Compiled in a process of its own: in this one the kernels may be for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("triton_targets.py")
    command = [sys.executable, script, "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [Row.from_json(line) for line in result.stdout.splitlines()]


@pytest.fixture(params=TARGETS)
def rows(request, all_rows) -> list[Row]:
    found = [row for row in all_rows if row.target == request.param and row.variant in VARIANTS]
    assert [row.variant for row in found] == list(VARIANTS)
    return found


def accesses(row: Row, found: list[int]) -> Counter[int]:
    single = row.variant.types[1].primitive_bitwidth
    return Counter(bits for bits in found if bits > single)


def expected_accesses(variant: Variant, *tensors: tl.dtype) -> Counter[int]:
    """The accesses by width to tensors of these types, if a thread takes each in one access."""
    if variant.dtype == "float64":
        return Counter()  # accesses of one element, as if threads take elements one by one
    elements = step.ELEMENTS[variant.types[1]]
    return Counter(elements * tensor.primitive_bitwidth for tensor in tensors)


def test_whole_blocks_are_read_in_the_widest_accesses(rows):
    for row in rows:
        v = row.variant
        if v.rule == SQUARES:
            blocks = step.CHUNK // step.block_size(v.types[1])
            expected = expected_accesses(v, *[v.types[0]] * blocks)
            if row.target == "gfx942" and v.dtype != "float64":
                expected[64] += 4  # numbers in float64
            assert accesses(row, row.loads) == expected, row
            continue
        # with a gradient, and without: then the parameter is read for the averages alone
        averages = [v.average] * v.averages
        moving = [v.types[0], *[v.state] * v.states] if v.rule != "frozen" else []
        expected = expected_accesses(v, v.weight, *moving, *averages)
        if v.averages:
            expected += expected_accesses(v, v.weight, *averages)
        assert accesses(row, row.loads) == expected, row


def test_whole_blocks_are_written_in_the_widest_accesses(rows):
    for row in rows:
        v = row.variant
        averages = [v.average] * v.averages
        moving = []
        if v.rule not in ("frozen", SQUARES):
            moving = [v.weight, *[v.types[0]] * v.master, *[v.state] * v.states]
        expected = expected_accesses(v, *moving, *averages) + expected_accesses(v, *averages)
        if v.rule == SQUARES and row.target == "gfx942":
            expected = Counter({128: 2, 96: 1})  # what is decided, by one thread
            if v.dtype != "float64":
                expected[64] = 1  # the sum, which is float64
        assert accesses(row, row.stores) == expected, row


def test_products_and_sums_are_rounded_apart(rows):
    for row in rows:
        # AMD makes divisions and roots of fused operations, which are not of the rules
        if row.target != "gfx942" or row.variant.rule not in DIVIDING:
            assert row.fused == 0, row


def test_divisions_and_roots_are_rounded_correctly(rows):
    for row in rows:
        assert (row.divisions > 0) == (row.variant.rule in DIVIDING), row
        assert not row.inexact, row


def test_half_of_the_threads_fit_and_nothing_spills(rows):
    for row in rows:
        v = row.variant
        wide_sums = v.rule == SQUARES and v.dtype == "float64"  # of 32 loads under way
        assert row.occupancy >= OCCUPANCY - (1 / 8 if wide_sums else 0), row
        # ptxas keeps registers in memory of Adam in float64 on sm_100, and of RMSProp's states
        few = {"sm_90": 8, "sm_100": 40}.get(row.target, 0) if v.rule == "rmsprop" else 0
        assert row.spilled <= max(few, 8 if v.dtype == "float64" else 0), row


def test_threads_exchange_nothing(rows):
    for row in rows:
        assert row.shared == 0 or row.variant.rule == SQUARES, row


def test_ratios_are_taken_in_the_widest_accesses(all_rows):
    found = [row for row in all_rows if row.variant in RATIOS]
    assert len(found) == len(TARGETS) * len(RATIOS)
    for row in found:
        v = row.variant
        if row.target != "gfx942":  # which reads what else there is in words, too
            measured = [v.state] * v.states if "lamb" in v.rule else []
            expected = expected_accesses(v, v.weight, v.types[0], *measured)
            assert accesses(row, row.loads) == expected, row
            assert row.fused == 0, row
        # of LAMB's 66 registers a thread on sm_100
        fewer = 1 / 16 if row.target == "sm_100" and "lamb" in v.rule else 0
        assert row.occupancy >= OCCUPANCY - fewer, row
        assert not row.inexact, row
        assert row.spilled == 0, row


def test_folding_takes_no_memory_of_a_thread(all_rows):
    found = [row for row in all_rows if row.variant in FOLDS]
    assert len(found) == len(TARGETS) * len(FOLDS)
    for row in found:
        assert row.spilled == 0, row

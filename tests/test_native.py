"""What the C++ loops promise beyond parity: the same bits everywhere, no scalar loops."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import CHUNK, DTYPES
from optimizers import Optimizer, Options, each_setting
from torch import nn

from fused_ema import FusedScaledAdamW, FusedScaledSGD, _native

TARGETS = _native.cpu_targets()
BOOLS = ("false", "true")
# The functors of csrc/rules that take roots.
WITH_ROOTS = (
    *(f"Adam<{amsgrad}>" for amsgrad in BOOLS),
    "Lamb",
    *(f"Rmsprop<{momentum}, {centered}>" for momentum in BOOLS for centered in BOOLS),
)


def trajectory(optimizer: Optimizer, options: Options, dtype: torch.dtype) -> list[torch.Tensor]:
    """Everything an optimizer holds after some steps over awkward sizes."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((0,), (1,), (15,), (16,), (17,), (3, 33), (2 * CHUNK + 5,))
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    shared = {"lr": 0.1, "ema_decay": (0.9, 0.3), "kappa": 2.0, "max_grad_norm": 5.0}
    opt = optimizer.ours(params, backend="native", **shared, **options)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        opt.step()
    held = [t for p in params for t in (p.detach(), *opt.state[p].values())]
    return [*held, opt.grad_norm]


def assert_same_bits(tensors, others) -> None:
    for a, b in zip(tensors, others, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@each_setting
def test_every_cpu_target_gives_the_same_bits(optimizer, options, dtype, monkeypatch):
    results = []
    for target in TARGETS:
        monkeypatch.setenv("FUSED_EMA_CPU", target)
        results.append(trajectory(optimizer, options, dtype))
    for result in results[1:]:
        assert_same_bits(results[0], result)


@pytest.mark.parametrize("dtype", DTYPES)
@each_setting
def test_thread_count_does_not_change_a_bit(optimizer, options, dtype):
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(trajectory(optimizer, options, dtype))
    finally:
        torch.set_num_threads(2)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_the_environment_chooses_the_target(monkeypatch):
    def target() -> str:
        optimizer = FusedScaledSGD([nn.Parameter(torch.ones(1))], lr=0.1)
        optimizer.step()
        return optimizer._stepper.plans[0].target

    monkeypatch.delenv("FUSED_EMA_CPU", raising=False)
    assert target() == TARGETS[0]
    monkeypatch.setenv("FUSED_EMA_CPU", TARGETS[-1])
    assert target() == TARGETS[-1]
    monkeypatch.setenv("FUSED_EMA_CPU", "avx1024")
    message = f"FUSED_EMA_CPU=avx1024 cannot run here; allowed: {', '.join(TARGETS)}"
    with pytest.raises(ValueError, match=message):
        target()


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("avx512", r"vsqrtp[sd]\s.*%zmm"),
        ("avx2", r"vsqrtp[sd]\s.*%ymm"),
        ("baseline", r"\ssqrtp[sd]\s"),
        ("neon", r"\sfsqrt\s+v"),
    ],
)
def test_every_loop_with_a_root_is_vectorised_and_asks_for_memory(target, instruction):
    if shutil.which("objdump") is None or target not in TARGETS:
        pytest.skip("needs objdump, and a processor with the target")
    if b"__asan_init" in Path(_native.__file__).read_bytes():
        pytest.skip("a sanitized build is not optimized")
    check_loops("objdump", _native.__file__, target, instruction)


def check_loops(objdump: str, file: str | Path, target: str, instruction: str) -> None:
    command = [objdump, "-d", "-C", "--no-show-raw-insn", file]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n(?=[0-9a-f]+ <)", listing)
    for rule in WITH_ROOTS:
        halves = ("fused_ema::BFloat16", "fused_ema::Half")
        no_master = [f"fused_ema::NoMaster<{stored}>" for stored in ("float", "double", *halves)]
        for layout in (*no_master, *(f"fused_ema::Master<{stored}>" for stored in halves)):
            name = f"cpu::{target}::step_piece<fused_ema::{rule}, {layout} >"
            loop = f"cpu::{target}::rule_loop<fused_ema::{rule}, {layout} >"
            bodies = [f for f in functions if name in f[:300] or loop in f[:300]]
            assert bodies, name
            loops = [body for body in bodies if re.search(instruction, body)]
            assert loops, name
            assert all(re.search(r"prefetch|\bprfm\b", body) for body in loops), name


def test_one_native_call_a_bucket_and_step(monkeypatch):
    params = [nn.Parameter(torch.ones(3)) for _ in range(50)]
    optimizer = FusedScaledAdamW([{"params": [p], "lr": 0.1} for p in params], ema_decay=0.9)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    (plan,) = optimizer._stepper.plans
    calls = []

    class Counted:
        def prepare(self, fold):
            calls.append("prepare")
            return plan.prepare(fold)

        def run(self, control):
            calls.append("run")
            plan.run(control)

    optimizer._stepper.latest.plans = [Counted()]
    optimizer.step()
    assert calls == ["prepare", "run"]


def test_plans_are_kept_while_nothing_changes():
    params = [nn.Parameter(torch.ones(3))]
    optimizer = FusedScaledAdamW(params, ema_decay=0.9)
    params[0].grad = torch.ones(3)
    optimizer.step()
    plans = optimizer._stepper.plans
    for field, value, kept in (
        ("lr", 0.5, True),
        ("kappa", 4.0, True),
        ("ema_decay", 0.5, True),
        ("ema_decay", (0.5, 0.6), False),
        ("amsgrad", True, False),
        ("ema_order", "before", False),
    ):
        optimizer.param_groups[0][field] = value
        optimizer.zero_grad()
        params[0].grad = torch.ones(3)
        optimizer.step()
        assert (optimizer._stepper.plans is plans) == kept, field
        plans = optimizer._stepper.plans

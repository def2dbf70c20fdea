"""Counts of a step that no noise changes: operators, native calls, bytes held, instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import providers
from bench.cases import Case
from bench.check import Checker
from bench.data import Data
from bench.device import Cpu
from bench.spec import OPTIMIZERS, SCENARIOS
from fused_ema import FusedScaledAdamW

CPU = Cpu()
ON_CPU = [scenario for scenario in SCENARIOS.values() if not scenario.graphed]
FEW, MANY = (Case(f"{n} tensors", ((16,),) * n, num_groups=2) for n in (6, 60))
HEADER = Path("/usr/include/valgrind/callgrind.h")

# Instructions of the host's part of a step with new gradients, as callgrind counts them, for every
# step and for every tensor in it. About 350 per tensor check, before the kernels run, that nothing
# has been replaced since it was read. Lower the limits when the path gets shorter.
MOST_INSTRUCTIONS_PER_STEP = 230_000
MOST_INSTRUCTIONS_PER_TENSOR = 1160

# Calls of Python functions in a step, and more of them for every group whose lr has changed.
MOST_PYTHON_CALLS = 65
MOST_PYTHON_CALLS_PER_NEW_LR = 80

# In the chain: GradScaler's bookkeeping.
MOST_OPERATORS = {"step": 2, "clip": 6, "chain": 13, "three_emas": 2, "bf16": 2, "ema": 2}


def counts(scenario, case):
    spec = replace(OPTIMIZERS["adamw"], scenario=scenario)
    checker = Checker(spec, Data.draw(case, scenario.dtype, CPU, seed=0), CPU)
    verdict = checker.check(providers.NATIVE)
    assert verdict.is_right, verdict.reason
    return verdict.counts


@pytest.mark.parametrize("scenario", ON_CPU, ids=lambda scenario: scenario.name)
def test_operators_and_memory_do_not_grow_with_the_tensors(scenario):
    few, many = counts(scenario, FEW), counts(scenario, MANY)
    assert few.num_operators == many.num_operators <= MOST_OPERATORS[scenario.name]
    # scalars alone, no temporary of a parameter's size
    assert few.peak_bytes == many.peak_bytes <= (64 if scenario.clip else 0)


def test_peak_memory_sees_what_a_step_frees_again():
    def step():
        first = torch.empty(1000)
        del first
        torch.empty(1500).add_(torch.empty(1500))

    assert CPU.peak_memory(step) == 2 * 4 * 1500


def calls(num_tensors: int, lr_factor: float = 1.0) -> tuple[Counter[str], int]:
    """Counts of one step's calls, for two groups, into the extension and to Python functions."""
    params = [nn.Parameter(torch.ones(8)) for _ in range(num_tensors)]
    groups = [{"params": params[::2]}, {"params": params[1::2]}]
    opt = FusedScaledAdamW(groups, lr=0.1, ema_decay=0.9, kappa=2.0, backend="native")
    native: Counter[str] = Counter()
    python = 0

    def note(frame, event, function):
        nonlocal python
        if event == "c_call" and getattr(function, "__module__", None) == "fused_ema._native":
            native[function.__name__] += 1
        python += event == "call"

    for _ in range(3):
        for param in params:
            param.grad = torch.ones(8)
        for group in opt.param_groups:
            group["lr"] *= lr_factor
        native.clear()
        python = 0
        sys.setprofile(note)
        opt.step()
        sys.setprofile(None)
    return native, python


def test_native_and_python_calls_of_a_step():
    native, python = calls(6)
    assert native == {"unchanged": 2, "prepare": 1}  # "run" is called from C
    assert calls(60) == (native, python)
    assert python <= MOST_PYTHON_CALLS


def test_a_new_learning_rate_costs_no_look_at_the_whole_group():
    (_, same), (native, changed) = calls(6), calls(6, lr_factor=0.9)
    assert native == {"unchanged": 2, "prepare": 1}
    assert 0 < changed - same <= 2 * MOST_PYTHON_CALLS_PER_NEW_LR


def test_instructions_of_the_host(tmp_path):
    if shutil.which("valgrind") is None or not HEADER.exists():
        pytest.skip("needs valgrind and its headers")
    tensors = (100, 1100)
    worker = Path(__file__).with_name("callgrind_worker.py")
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=out"]
    arguments = [sys.executable, str(worker), *map(str, tensors)]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dumps = [(tmp_path / f"out.{k + 1}").read_text() for k in range(len(tensors))]
    few, many = (int(re.search(r"^totals: (\d+)", d, re.M)[1]) for d in dumps)
    per_tensor = (many - few) / (tensors[1] - tensors[0])
    per_step = few - tensors[0] * per_tensor
    assert 0 < per_tensor < MOST_INSTRUCTIONS_PER_TENSOR, per_tensor
    assert 0 < per_step < MOST_INSTRUCTIONS_PER_STEP, per_step

"""What a step asks of Triton: its dispatch once, then the compiled kernel alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_ema.kernels.launching import Launch

# What a fixture makes once is made in one worker.
pytestmark = pytest.mark.xdist_group("triton launches")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Any]:
    """In a process of its own: in this one the kernels may be for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("triton_launch_worker.py")
    command = [sys.executable, "-W", "ignore", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("run", "kernels"),
    [
        ("sgd", ["step_kernel"]),
        ("clipped", ["squares_kernel", "step_kernel"]),
        ("capturable", ["fold_kernel", "step_kernel"]),
    ],
)
def test_dispatch_sees_the_first_step_alone(run, kernels, seen):
    steps = len(seen[run]["dispatches"])
    assert seen[run]["dispatches"] == [len(kernels)] * steps
    assert [name for name, *_ in seen[run]["launches"]] == kernels * steps


def test_later_launches_are_those_of_the_dispatch(seen):
    first, *others = seen["sgd"]["launches"]
    programs, pointers = 3, 6
    assert first[1] == programs
    assert len(set(first[3])) == pointers
    assert others == [first] * len(others)


@pytest.mark.parametrize("run", ["sgd", "capturable"])
def test_nothing_is_copied_or_made_while_nothing_changes(run, seen):
    first, *others = seen[run]["operators"]
    assert "aten::copy_" in first
    assert others == [[]] * len(others)


def test_a_launch_takes_the_current_stream_and_hooks(seen):
    assert seen["stream"] == 7
    assert seen["hooked"]


def test_a_launch_is_on_its_device(monkeypatch):
    devices = []

    def device_index(index: int | None) -> nullcontext[None]:
        devices.append(index)
        return nullcontext()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *pointers, **options: None

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    launch = Launch(Kernel(), 1, torch.device("cuda", 3), (), {})
    launch()
    launch()
    assert devices == [3, 3]

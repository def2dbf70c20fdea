"""One optimizer a parameter, stepped in the backward pass: docs/frameworks/step-in-backward.md."""

from __future__ import annotations

import subprocess
import sys

import pages
import torch
from pages import one_thread  # noqa: F401

from fused_ema import FusedScaledAdamW


def test_the_recipe_does_what_one_optimizer_does():
    torch.manual_seed(0)
    names = pages.run_page("frameworks/step-in-backward.md")
    model, optimizers = names["model"], names["optimizers"]
    assert all(param.grad is None for param in model.parameters())
    torch.manual_seed(0)
    twin = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
    opt = FusedScaledAdamW(twin.parameters(), lr=1e-3, ema_decay=0.999)
    for _ in range(10):
        opt.zero_grad()
        twin(torch.randn(64, 8)).square().mean().backward()
        opt.step()
    expected = opt.ema_state_dict(twin)
    assert names["average"].keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(names["average"][name], value), name
    assert len(optimizers) == 4
    assert not torch.equal(expected["0.weight"], twin[0].weight)


def test_the_measurement_runs():
    command = ("-m", "bench.many_optimizers", "--parameters", "3", "--rounds", "2")
    done = subprocess.run(
        [sys.executable, *command], cwd=pages.ROOT, capture_output=True, text=True, check=True
    )
    assert "one optimizer" in done.stdout
    assert "3 optimizers" in done.stdout

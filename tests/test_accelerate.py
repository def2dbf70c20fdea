"""accelerate and Lightning Fabric: everything is reachable through a prepared optimizer."""

from __future__ import annotations

import warnings

import pages
import pytest
import torch
from pages import one_thread  # noqa: F401
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    from fused_ema.integrations.accelerate import Accelerator, reachable

from fused_ema import (
    FusedEMA,
    FusedScaledAdamW,
    FusedScaledSGD,
    ProgressiveScaling,
    ema_state_dict,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def accelerated(optimizer):
    return Accelerator(cpu=True).prepare(optimizer)


def fabricated(optimizer, model):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    return fabric.setup(model, optimizer)[1]


def prepared(framework: str, optimizer, model):
    return accelerated(optimizer) if framework == "accelerate" else fabricated(optimizer, model)


def step(model, optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("framework", ["accelerate", "fabric"])
def test_everything_acts_on_the_optimizer_inside(framework):
    model = nn.Linear(3, 2)
    opt = FusedScaledAdamW(model.parameters(), lr=0.1, ema_decay=0.5, max_grad_norm=1.0)
    wrapper = prepared(framework, opt, model)
    wrapper.kappa = 4.0
    assert opt.kappa == wrapper.kappa == 4.0
    with pytest.raises(ValueError, match="kappa=-1"):
        wrapper.kappa = -1
    ProgressiveScaling(wrapper, 8, {0: 16})
    assert opt.kappa == 2.0
    step(model, wrapper)
    average = opt.ema_state_dict(model)
    assert torch.equal(wrapper.ema_state_dict(model)["weight"], average["weight"])
    assert torch.equal(ema_state_dict(model, [wrapper])["weight"], average["weight"])
    assert wrapper.grad_norm == opt.grad_norm
    with wrapper.ema_weights():
        assert torch.equal(model.weight, average["weight"])
        with pytest.raises(RuntimeError, match="inside ema_weights"):
            wrapper.step()
    assert not torch.equal(model.weight, average["weight"])
    other = prepared(framework, torch.optim.SGD(model.parameters(), lr=0.1), model)
    ema = FusedEMA(other, ema_decay=0.0)
    step(model, other)
    assert torch.equal(ema.ema_state_dict(model)["weight"], model.weight)


def test_accelerates_own_wrapper_can_be_made_reachable():
    model = nn.Linear(3, 2)
    opt = FusedScaledSGD(model.parameters(), lr=0.1, ema_decay=0.5)
    accelerated(opt)  # accelerate's state
    wrapper = AcceleratedOptimizer(opt)
    assert reachable(wrapper) is wrapper
    assert reachable(reachable(wrapper)) is wrapper
    wrapper.kappa = 4.0
    assert opt.kappa == 4.0
    plain = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    assert type(reachable(plain)) is AcceleratedOptimizer
    assert reachable(opt) is opt


def test_a_state_is_saved_and_loaded_with_accelerates(tmp_path):
    def begin():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        accelerator = Accelerator(cpu=True)
        opt = FusedScaledAdamW(model.parameters(), lr=0.1, ema_decay=0.5, kappa=2)
        return accelerator, *accelerator.prepare(model, opt)

    accelerator, model, wrapper = begin()
    step(model, wrapper)
    accelerator.save_state(tmp_path)
    step(model, wrapper)
    again, other, resumed = begin()
    again.load_state(tmp_path)
    step(other, resumed)
    for found, expected in (
        (other.state_dict(), model.state_dict()),
        (resumed.ema_state_dict(other), wrapper.ema_state_dict(model)),
    ):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_overflow_is_a_skipped_step():
    """Which the Trainer asks accelerate for, before it steps its scheduler."""
    model = nn.Linear(3, 2)
    accelerated(opt := FusedScaledSGD(model.parameters(), lr=0.1, ema_decay=0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapper = reachable(AcceleratedOptimizer(opt, scaler=scaler))
    for factor in (1.0, torch.inf, 1.0):
        before = model.weight.detach().clone()
        wrapper.zero_grad()
        scaler.scale(factor * model(torch.ones(2, 3)).sum()).backward()
        wrapper.step()
        skipped = factor == torch.inf
        assert wrapper.step_was_skipped == skipped
        assert torch.equal(before, model.weight) == skipped


def test_the_page_and_the_examples_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lightning.fabric")
    monkeypatch.chdir(tmp_path)
    pages.run_page("frameworks/accelerate.md")
    pages.run_example("train_accelerate.py", monkeypatch)
    pages.run_example("train_fabric.py", monkeypatch)
    assert capsys.readouterr().out.count("error of the average") == 2

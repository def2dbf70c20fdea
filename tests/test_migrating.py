"""docs/migrating.md: every block runs, and every *after* does what its *before* did."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from foreign import (
    DIFFUSERS,
    EMA_PYTORCH,
    MODULES,
    TIMM,
    assert_averages,
    batches,
    installed,
    network,
    per_package,
    written_by_hand,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fused_ema import FusedScaledSGD

TEXT = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text()
SECTIONS = {
    section.split("\n", 1)[0]: re.findall(r"```python\n(.*?)```", section, flags=re.S)
    for section in TEXT.split("\n## ")
}


class Session(dict):
    """What a user's script holds when a block of the page is run in it."""

    def __init__(self, model: nn.Module, loader: list) -> None:
        self.evaluated: dict[str, torch.Tensor] = {}
        super().__init__(
            torch=torch,
            model=model,
            loader=loader,
            loss_fn=nn.functional.mse_loss,
            evaluate=lambda net: self.evaluated.update(copy.deepcopy(net.state_dict())),
        )

    def run(self, block: str) -> None:
        exec(compile(block, "docs/migrating.md", "exec"), self)

    def run_loop(self, block: str) -> None:
        self.run(re.search(r"^for .*?(?=^\S)", block, flags=re.S | re.M)[0])

    def run_evaluation(self, block: str) -> None:
        self.run(re.search(r"^for .*?(^\S.*)", block, flags=re.S | re.M)[1])


def assert_same_average(found: Session, expected: Session, package: str) -> None:
    """Weights are of order one; a decay that is off at one step moves them by lr or more."""
    dtype = found["model"][0].weight.dtype
    assert found.evaluated.keys() == expected.evaluated.keys()
    for name, value in expected.evaluated.items():
        if package == EMA_PYTORCH and name.endswith("num_batches_tracked"):
            continue  # which it never updates
        # ema-pytorch computes its decay in float32, whatever the model
        atol = 1e-5 if dtype == torch.float32 else 1e-7
        torch.testing.assert_close(found.evaluated[name], value, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@per_package
def test_after_does_what_before_did(package, dtype, tmp_path, monkeypatch):
    installed(package)
    monkeypatch.chdir(tmp_path)
    before, after, _ = SECTIONS[package]
    theirs, ours = (Session(network(dtype), batches(40, dtype, seed=1)) for _ in range(2))
    theirs.run(before)
    ours.run(after)
    assert_same_average(ours, theirs, package)
    start, weights = network(dtype), theirs["model"].state_dict()
    for name, value in start.named_parameters():
        assert (value - theirs.evaluated[name]).abs().max() > 1e-4, name
        assert (weights[name] - theirs.evaluated[name]).abs().max() > 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@per_package
def test_a_run_goes_on_from_what_was_saved(package, dtype, tmp_path, monkeypatch):
    installed(package)
    monkeypatch.chdir(tmp_path)
    before, after, load = SECTIONS[package]
    theirs = Session(network(dtype), batches(20, dtype, seed=1))
    theirs.run(before)
    ours = Session(copy.deepcopy(theirs["model"]), [])
    ours.run(after)
    ours["loader"] = theirs["loader"]
    ours.run(load)
    for session, block in ((theirs, before), (ours, after)):
        session["loader"] = batches(20, dtype, seed=2)
        session.run_loop(block)
        session.run_evaluation(block)
    assert_same_average(ours, theirs, package)


@per_package
def test_after_and_load_run_without_the_package(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, after, load = SECTIONS[package]
    session = Session(network(), batches(3, torch.float32, seed=1))
    session.run(after)
    saved = {"opt": session["opt"].state_dict(), "ema": written_by_hand(package, network(seed=1))}
    torch.save(saved, "before.pt")
    session.run(load)
    assert_averages(session["opt"], session["model"], network(seed=1))


def test_the_equal_mean():
    def mean(t):
        return t / (t + 1)

    assert "ema_decay=lambda t: t / (t + 1)" in TEXT
    theirs, ours = network(), network()
    torch_opt, averaged = torch.optim.SGD(theirs.parameters(), lr=0.1), AveragedModel(theirs)
    opt = FusedScaledSGD(ours.parameters(), lr=0.1, ema_decay=mean, model=ours)
    for x, y in batches(10, torch.float32, seed=1):
        for model, optimizer in ((theirs, torch_opt), (ours, opt)):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        averaged.update_parameters(theirs)
    torch.testing.assert_close(
        opt.ema_state_dict(ours), dict(averaged.module.state_dict()), rtol=1e-5, atol=1e-6
    )


def trained(ema_buffers: str) -> tuple[nn.Sequential, FusedScaledSGD]:
    model = network()
    opt = FusedScaledSGD(
        model.parameters(), lr=0.1, ema_decay=0.5, model=model, ema_buffers=ema_buffers
    )
    for x, y in batches(5, torch.float32, seed=1):
        nn.functional.mse_loss(model(x), y).backward()
        opt.step()
    return model, opt


@pytest.mark.parametrize("ema_buffers", ["copy", "average"])
def test_a_plain_state_dict_loads_strictly(ema_buffers):
    model, opt = trained(ema_buffers)
    session = Session(model, [])
    session["opt"] = opt
    session.run(SECTIONS["And back"][0])
    average, fresh = opt.ema_state_dict(model), network(seed=1)
    fresh.load_state_dict(average, strict=True)
    for net in (fresh, session["exported"]):
        torch.testing.assert_close(dict(net.state_dict()), average, rtol=0, atol=0)
    assert not torch.equal(fresh[0].weight, model[0].weight)
    own_statistics = torch.equal(fresh[1].running_mean, model[1].running_mean)
    assert own_statistics == (ema_buffers == "copy")


def test_a_plain_state_dict_survives_safetensors():
    safetensors = pytest.importorskip("safetensors.torch")
    model, opt = trained("average")
    average = opt.ema_state_dict(model)
    assert_close = torch.testing.assert_close
    assert_close(safetensors.load(safetensors.save(average)), average, rtol=0, atol=0)


@per_package
def test_the_packages_take_it_back(package):
    module = installed(package)
    model, opt = trained("copy")
    session = Session(model, [])
    session["opt"] = opt
    for block in SECTIONS["And back"]:
        session.run(block)
    average = session["average"]
    if package == DIFFUSERS:
        ema = module.EMAModel(network(seed=1).parameters(), decay=0.5)
        ema.load_state_dict(session["state"])
        ema.step(model.parameters())
        found = dict(zip(dict(model.named_parameters()), ema.shadow_params, strict=True))
    elif package == EMA_PYTORCH:
        ema = module.EMA(model, ema_model=network(seed=1), beta=0.5, update_every=1)
        ema.ema_model.load_state_dict(average)
        ema.initted.fill_(True)
        ema.step.fill_(1000)
        ema.update()
        found = ema.ema_model.state_dict()
    elif package == TIMM:
        ema = module.ModelEmaV3(network(seed=1), decay=0.5)
        ema.module.load_state_dict(average)
        ema.update(model)
        found = ema.module.state_dict()
    else:
        ema = AveragedModel(network(seed=1))
        ema.module.load_state_dict(average)
        ema.n_averaged.fill_(1)
        ema.update_parameters(model)
        found = ema.module.state_dict()
    for name, param in model.named_parameters():
        torch.testing.assert_close(found[name], (average[name] + param.detach()) / 2)


def test_the_report():
    model, opt = trained("copy")
    session = Session(model, [])
    session["opt"] = opt
    session.run(SECTIONS["What load_ema does"][0])
    assert session["updates"] is None
    assert set(session["unused"]) == set(dict(model.named_buffers()))


def test_every_package_has_its_section():
    assert [name for name, blocks in SECTIONS.items() if len(blocks) == 3] == list(MODULES)

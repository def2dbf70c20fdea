"""attach_model(): optimizers that a factory has made from parameters alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from fused_ema import FusedEMA, FusedScaledAdamW, FusedScaledSGD

MODES = ("copy", "average", "leave")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 1))


def groups(model: nn.Module) -> list[dict]:
    """As factories make them: matrices apart from the rest."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1]},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def made(module: nn.Module, **options):
    return FusedScaledAdamW(groups(module), lr=0.05, ema_decay=0.7, **options)


def train(model: nn.Module, opt, steps: int = 3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        opt.zero_grad()
        model(torch.randn(8, 4, generator=generator) + 1).square().mean().backward()
        opt.step()


def assert_same(found: nn.Module | dict, expected: nn.Module | dict) -> None:
    found, expected = (x.state_dict() if isinstance(x, nn.Module) else x for x in (found, expected))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_it_does_what_the_constructor_does(mode, with_teacher):
    results = []
    for attached in (True, False):
        model, teacher = network(), network(1) if with_teacher else None
        known = {"teacher": teacher, "ema_buffers": mode}
        opt = made(model) if attached else made(model, model=model, **known)
        if attached:
            opt.attach_model(model, **known)
        train(model, opt)
        results.append((opt.ema_state_dict(model), teacher or model, opt.state_dict()))
    (average, teacher, saved), expected = results
    assert_same(average, expected[0])
    assert_same(teacher, expected[1])
    assert str(saved) == str(expected[2])


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("when", ["loaded", "stepped"])
def test_an_average_that_exists_goes_on(when, with_teacher):
    model, teacher = network(), network(1) if with_teacher else None
    opt = made(model, model=model, teacher=teacher, ema_buffers="average")
    train(model, opt)
    other, copied = copy.deepcopy(model), network(2) if with_teacher else None
    resumed = made(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(opt.state_dict())
    resumed.attach_model(other, teacher=copied, ema_buffers="average")
    if when == "stepped":
        train(model, opt, seed=1)
        train(other, resumed, seed=1)
    assert_same(resumed.ema_state_dict(other), opt.ema_state_dict(model))
    assert str(resumed.state_dict()["state"]) == str(opt.state_dict()["state"])
    if with_teacher:
        assert_same(copied, teacher)
        assert resumed.state[other[0].weight]["ema"] is copied[0].weight


def test_a_teacher_takes_an_average_that_steps_have_made():
    model, teacher = network(), network(1)
    opt = made(model)
    train(model, opt)
    expected = opt.state[model[0].weight]["ema"].clone()
    opt.attach_model(model, teacher=teacher)
    assert torch.equal(teacher[0].weight, expected)
    train(model, opt, steps=1)
    moved = expected + 0.3 * (model[0].weight.detach() - expected)
    torch.testing.assert_close(teacher[0].weight.detach(), moved)
    assert torch.equal(teacher[1].running_mean, model[1].running_mean)


def test_what_it_refuses_changes_nothing():
    model, stranger = network(), network(1)
    opt = made(model)
    with pytest.raises(ValueError, match="model holds none of the optimizer's parameters"):
        opt.attach_model(stranger)
    with pytest.raises(ValueError, match="model: received a str; allowed: a module"):
        opt.attach_model("model")
    with pytest.raises(ValueError, match="ema_buffers='all' is not known"):
        opt.attach_model(model, ema_buffers="all")
    with pytest.raises(ValueError, match=r"teacher: '0\.weight' has shape"):
        opt.attach_model(model, teacher=nn.Sequential(nn.Linear(5, 6, bias=False), *network(1)[1:]))
    with opt.ema_weights(), pytest.raises(RuntimeError, match="inside ema_weights"):
        opt.attach_model(model)
    opt.attach_model(model)
    with pytest.raises(RuntimeError, match="knows its model already"):
        opt.attach_model(model)
    taught = FusedScaledSGD(model[2].parameters(), ema_decay=0.5, teacher=network(1)[2])
    with pytest.raises(RuntimeError, match="has a teacher already"):
        taught.attach_model(model, teacher=stranger)


def test_of_a_fused_ema():
    model, teacher = network(), network(1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = FusedEMA(sgd, ema_decay=0.0)
    ema.attach_model(model, teacher=teacher)
    train(model, sgd, steps=1)
    assert_same(teacher, model)

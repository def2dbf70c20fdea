"""What an optimizer holds of parameters that are frozen, or replaced, for a while."""

from __future__ import annotations

import copy
from itertools import chain

import pytest
import torch
from optimizers import each_setting
from torch import nn

from fused_ema import FusedScaledAdamW, FusedScaledSGD


def halves():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(4, generator=generator).bfloat16()) for _ in range(2)]


def take(opt, params) -> None:
    opt.zero_grad()
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    opt.step()


def nothing(opt, params):
    return opt


def replan(opt, params):
    opt.param_groups[0]["params"] = list(params)
    return opt


def another_state(opt, params):
    opt.state[params[1]]["mine"] = 1
    return opt


def a_field(opt, params):
    opt.param_groups[0]["ema_decay"] = (0.9, 0.5)
    take(opt, params[1:])
    opt.param_groups[0]["ema_decay"] = 0.9
    opt.state[params[0]].pop("ema_1")
    return opt


def reload(opt, params):
    other = type(opt)(params, lr=1e-3, master_weights=True, ema_decay=0.9)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    return other


def duplicate(opt, params):
    other = copy.deepcopy(opt)
    copies = other.param_groups[0]["params"]
    for p, q in zip(params, copies, strict=True):
        opt.state[p] = other.state[q]
    return opt


@pytest.mark.parametrize(
    "cause", [replan, another_state, reload, duplicate], ids=lambda f: f.__name__
)
@each_setting
def test_masters_outlive_freezing(optimizer, options, cause):
    ends = []
    for what in (nothing, cause):
        params = halves()
        opt = optimizer.ours(params, lr=1e-3, master_weights=True, ema_decay=0.9, **options)
        for _ in range(5):
            take(opt, params)
        params[0].requires_grad_(False)
        take(opt, params[1:])
        opt = what(opt, params)
        take(opt, params[1:])
        assert opt.state[params[0]]["master"].dtype == torch.float32
        params[0].requires_grad_(True)
        take(opt, params)
        ends.append([opt.state[p] for p in params])
    for right, found in zip(*ends, strict=True):
        assert all(torch.equal(value, found[key]) for key, value in right.items())


def test_a_frozen_average_follows_the_master():
    params = halves()
    opt = FusedScaledSGD(params, lr=1e-3, master_weights=True, ema_decay=0.5)
    take(opt, params)
    params[0].requires_grad_(False)
    opt = replan(opt, params)
    for _ in range(60):
        take(opt, params[1:])
    state = opt.state[params[0]]
    torch.testing.assert_close(state["ema"], state["master"], rtol=1e-6, atol=0.0)
    assert not torch.equal(state["master"], params[0].float())


def test_moments_of_frozen_parameters_are_loaded_as_they_are():
    params = halves()
    opt = FusedScaledAdamW(params, lr=1e-3, master_weights=True)
    take(opt, params)
    params[0].requires_grad_(False)
    other = FusedScaledAdamW(params, lr=1e-3, master_weights=True)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for key in ("exp_avg", "exp_avg_sq", "master"):
        assert torch.equal(other.state[params[0]][key], opt.state[params[0]][key])
        assert other.state[params[0]][key].dtype == torch.float32


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))


def test_replaced_parameters_keep_their_teacher_and_averages_by_name():
    for by_module in (True, False):
        model, teacher = net(), net()
        named = model.parameters() if by_module else model.named_parameters()
        options = {"model": model} if by_module else {}
        opt = FusedScaledAdamW(named, lr=0.1, ema_decay=(0.5, 0.9), teacher=teacher, **options)
        take(opt, list(model.parameters()))
        old = {name: opt.state[p] for name, p in model.named_parameters()}
        for module in model:
            for name, p in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(p.detach().clone()))
        opt.param_groups[0]["params"] = list(model.parameters())
        before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
        take(opt, list(model.parameters()))
        for (name, p), t in zip(model.named_parameters(), teacher.parameters(), strict=True):
            assert opt.state[p] is old[name]
            assert opt.state[p]["ema"] is t
            torch.testing.assert_close(t.detach(), before[name].lerp(p.detach(), 0.5))
        assert len(opt.state) == len(old)


@pytest.mark.parametrize("held", ["teacher", "averages", "masters"])
def test_replaced_parameters_without_names_are_refused(held):
    model = net().bfloat16() if held == "masters" else net()
    options = {
        "teacher": {"ema_decay": 0.5, "teacher": net()},
        "averages": {"ema_decay": 0.5},
        "masters": {"master_weights": True},
    }[held]
    opt = FusedScaledSGD(model.parameters(), lr=0.1, **options)
    if held != "teacher":
        take(opt, list(model.parameters()))
    other = copy.deepcopy(model)
    opt.param_groups[0]["params"] = list(other.parameters())
    weights = [p.detach().clone() for p in other.parameters()]
    for call in (opt.step, opt.state_dict, lambda: take(opt, list(other.parameters()))):
        with pytest.raises(RuntimeError, match="parameters of group 0 have been replaced"):
            call()
    assert all(map(torch.equal, other.parameters(), weights))


def test_a_replacement_must_fit():
    model, teacher = net(), net()
    opt = FusedScaledSGD(model.named_parameters(), lr=0.1, ema_decay=0.5, teacher=teacher)
    others = [nn.Parameter(p.detach().double()) for p in model.parameters()]
    opt.param_groups[0]["params"] = others
    with pytest.raises(ValueError, match=r"dtype torch\.float32; allowed"):
        opt.step()
    opt.param_groups[0]["params"] = [nn.Parameter(torch.ones(9)) for _ in others]
    with pytest.raises(RuntimeError, match=r"replaced by one of shape \(9,\)"):
        opt.step()


def test_groups_may_go_and_come():
    """What nobody replaces is no replacement: as in torch."""
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    opt = FusedScaledSGD([{"params": [first]}, {"params": [second]}], lr=0.1, ema_decay=0.5)
    take(opt, [first, second])
    opt.param_groups.pop(0)
    opt.add_param_group({"params": [third]})
    take(opt, [second, third])
    plain = FusedScaledSGD([first], lr=0.1, momentum=0.9)
    take(plain, [first])
    plain.param_groups[0]["params"] = [second]
    take(plain, [second])


def test_what_cannot_be_averaged_fails_in_the_constructor():
    float8 = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"a parameter that requires grad has dtype torch\.float8"):
        FusedScaledSGD([float8], ema_decay=0.9)


def test_memory_that_elements_share_is_refused_before_anything_moves():
    shared = nn.Parameter(torch.ones(1, 3).expand(4, 3))
    with pytest.raises(RuntimeError, match=r"share memory \(strides \(0, 1\)\)"):
        FusedScaledSGD([shared])
    plain, later = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 3))
    opt = FusedScaledSGD([{"params": [plain]}, {"params": [later]}], lr=0.1, ema_decay=0.5)
    take(opt, [plain, later])
    later.data = torch.ones(1, 3).expand(4, 3)
    before = plain.detach().clone()
    with pytest.raises(RuntimeError, match="share memory"):
        take(opt, [plain, later])
    assert torch.equal(plain, before)


def test_nothing_is_held_before_the_first_step():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).bfloat16()
    opt = FusedScaledAdamW(
        model.parameters(), ema_decay=0.5, master_weights=True, model=model, ema_buffers="average"
    )
    assert not opt.state_dict()["state"]
    assert not list(chain(*opt._buffers.averages))
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            tensor.fill_(3)
    take(opt, list(model.parameters()))
    state = opt.state[model[0].weight]
    torch.testing.assert_close(state["master"], torch.full((2, 2), 3.0), rtol=1e-2, atol=0.0)
    torch.testing.assert_close(state["ema"], torch.full((2, 2), 3.0), rtol=1e-2, atol=0.0)
    assert torch.equal(opt.ema_state_dict(model)["1.running_mean"], torch.full((2,), 3.0))

"""Saving, loading, copying: with torch's optimizers, with a changed dtype, in mid-training."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from optimizers import each_setting, each_setting_in_torch
from torch import nn

from fused_ema import CosineDecay, FusedScaledAdam, FusedScaledAdamW, FusedScaledSGD

LR = 0.1


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,), ())]


def advance(params, optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def through_file(state_dict):
    """Save and load as a checkpoint is, with torch's safe unpickler."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_setting_in_torch
def test_from_torch(optimizer, options, backend):
    ours, theirs = parameters(), parameters()
    reference = optimizer.theirs(theirs, lr=LR, foreach=False, **options)
    advance(theirs, reference, 5, seed=1)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    opt = optimizer.ours(ours, lr=LR, **options, ema_decay=0.9, backend=backend)
    opt.load_state_dict(through_file(reference.state_dict()))
    assert opt.param_groups[0]["ema_decay"] == 0.9
    advance(theirs, reference, 5, seed=2)
    advance(ours, opt, 5, seed=2)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


@each_setting_in_torch
def test_into_torch(optimizer, options, backend):
    ours, theirs = parameters(), parameters()
    opt = optimizer.ours(ours, lr=LR, **options, ema_decay=(0.9, 0.99), backend=backend)
    advance(ours, opt, 5, seed=1)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    reference = optimizer.theirs(theirs, lr=LR, foreach=False, **options)
    reference.load_state_dict(through_file(opt.state_dict()))
    advance(theirs, reference, 5, seed=2)
    advance(ours, opt, 5, seed=2)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


def test_momentum_that_saw_no_gradient_starts_in_torch_as_the_gradient():
    ours, theirs = parameters(), parameters()
    momentum = {"lr": LR, "momentum": 0.9, "dampening": 0.2}
    optimizer = FusedScaledSGD(ours, ema_decay=0.9, **momentum)
    optimizer.step()
    reference = torch.optim.SGD(theirs, foreach=False, **momentum)
    reference.load_state_dict(optimizer.state_dict())
    advance(theirs, reference, 3, seed=2)
    advance(ours, optimizer, 3, seed=2)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_setting
def test_resume_in_mid_training_is_bit_exact(optimizer, options, dtype, backend):
    shared = {"lr": LR, "ema_decay": CosineDecay(0.9, 40.0), "backend": backend, **options}
    straight = parameters(dtype)
    opt = optimizer.ours(straight, kappa=2.0, **shared)
    advance(straight, opt, 6, seed=1)
    saved = through_file(opt.state_dict())
    weights = [p.detach().clone() for p in straight]
    advance(straight, opt, 6, seed=2)

    resumed = parameters(dtype)
    with torch.no_grad():
        for p, weight in zip(resumed, weights, strict=True):
            p.copy_(weight)
    other = optimizer.ours(resumed, **shared)
    other.load_state_dict(saved)
    assert other.kappa == 2.0
    advance(resumed, other, 6, seed=2)
    for p, q in zip(straight, resumed, strict=True):
        assert torch.equal(p, q)
        for key, value in opt.state[p].items():
            assert torch.equal(value, other.state[q][key]), key


def test_loading_keeps_dtypes_and_copies():
    params = parameters(torch.bfloat16)
    optimizer = FusedScaledAdamW(params, ema_decay=0.999)
    advance(params, optimizer, 4, seed=1)
    other_params = parameters(torch.bfloat16)
    other = FusedScaledAdamW(other_params, ema_decay=0.999)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, other_params, strict=True):
        assert other.state[q]["ema"].dtype == torch.float32
        assert other.state[q]["exp_avg"].dtype == torch.bfloat16
        assert other.state[q]["step"].dtype == torch.float64
        assert torch.equal(other.state[q]["ema"], optimizer.state[p]["ema"])
        assert other.state[q]["ema"].data_ptr() != optimizer.state[p]["ema"].data_ptr()


def test_a_schedule_is_not_saved_but_its_position_is():
    params = parameters()
    optimizer = FusedScaledAdamW(params, ema_decay=(CosineDecay(0.9, 10.0), 0.99))
    optimizer.kappa = 3.0
    advance(params, optimizer, 2, seed=1)
    (saved,) = optimizer.state_dict()["param_groups"]
    assert saved["ema_decay"] == "schedule"
    assert saved["base_steps"] == 6.0
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    assert isinstance(optimizer.param_groups[0]["ema_decay"][0], CosineDecay)


def test_flags_that_choose_an_implementation_stay():
    params = parameters()
    reference = torch.optim.AdamW(params, foreach=True)
    advance(params, reference, 1, seed=1)
    optimizer = FusedScaledAdamW(params)
    optimizer.load_state_dict(reference.state_dict())
    advance(params, optimizer, 1, seed=1)
    assert optimizer.backends == ("native",)


def test_adamw_keeps_its_decay_when_loading_adam():
    params = parameters()
    optimizer = FusedScaledAdamW(params)
    optimizer.load_state_dict(torch.optim.Adam(params).state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda sd: sd["state"][0].update(ema=torch.zeros(2)), r"'ema' has shape \(2,\)"),
        (lambda sd: sd["state"][0].update(exp_avg=torch.zeros(2)), r"'exp_avg' has shape \(2,\)"),
        (lambda sd: sd["state"][0].update(exp_avg=[1.0]), "'exp_avg' is a list; allowed: a tensor"),
        (lambda sd: sd["state"][0].update(step=torch.tensor(-2.0)), r"'step' is -2\.0; allowed"),
        (lambda sd: sd["param_groups"][0].update(kappa=-1.0), "kappa=-1.0 is out of range"),
        (lambda sd: sd["param_groups"].append(sd["param_groups"][0]), "number of parameter groups"),
        (lambda sd: sd["param_groups"][0]["params"].pop(), "size of optimizer's group"),
    ],
)
def test_a_bad_state_changes_nothing(damage, message):
    params = parameters()
    optimizer = FusedScaledAdamW(params, ema_decay=0.9)
    advance(params, optimizer, 2, seed=1)
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    damage(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, entry in before["state"].items():
        for key, value in entry.items():
            assert torch.equal(after["state"][index][key], value)


def test_users_hooks_see_the_loaded_state():
    params = parameters()
    optimizer = FusedScaledAdamW(params, ema_decay=0.9)
    advance(params, optimizer, 2, seed=1)
    seen = []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, sd: {**sd, "param_groups": [{**sd["param_groups"][0], "lr": 0.5}]}
    )
    optimizer.register_load_state_dict_post_hook(
        lambda opt: seen.append(opt.state[params[0]]["ema"].dtype)
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert seen == [torch.float32]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@each_setting
def test_deepcopy_and_pickle_train_on_alike(optimizer, options, clone, backend):
    params = parameters()
    teacher = [p.detach().clone() for p in params]
    opt = optimizer.ours(params, lr=LR, **options, ema_decay=0.9, teacher=teacher, backend=backend)
    advance(params, opt, 3, seed=1)
    other = clone(opt)
    others = other.param_groups[0]["params"]
    assert other.backend == backend
    advance(params, opt, 3, seed=2)
    advance(others, other, 3, seed=2)
    for p, q in zip(params, others, strict=True):
        assert p is not q
        assert torch.equal(p, q)
        assert torch.equal(opt.state[p]["ema"], other.state[q]["ema"])
        assert other.state[q]["ema"] is other._teachers.tensors[q]


def test_an_empty_state_loads():
    fresh = FusedScaledAdam(parameters(), ema_decay=0.9)
    fresh.load_state_dict(FusedScaledAdam(parameters(), ema_decay=0.9).state_dict())
    plain = FusedScaledSGD(parameters(), lr=0.1)
    plain.load_state_dict(torch.optim.SGD(parameters(), lr=0.1).state_dict())


def test_state_dict_hooks_see_what_is_saved():
    optimizer = FusedScaledAdamW(parameters(), ema_decay=CosineDecay(0.9, 10.0))
    optimizer.register_state_dict_post_hook(lambda _, sd: {"inner": sd})
    saved = optimizer.state_dict()["inner"]
    assert saved["param_groups"][0]["ema_decay"] == "schedule"


def test_a_checkpoint_without_averages_does_not_turn_them_off():
    params = parameters()
    plain = FusedScaledAdamW(params)
    advance(params, plain, 2, seed=1)
    averaged = FusedScaledAdamW(params, ema_decay=0.9)
    averaged.load_state_dict(plain.state_dict())
    assert averaged.param_groups[0]["ema_decay"] == 0.9


def test_frozen_parameters_without_averages_have_no_saved_state():
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = FusedScaledAdamW(params)
    advance(params[1:], optimizer, 2, seed=1)
    saved = optimizer.state_dict()
    assert 0 not in saved["state"]
    theirs = torch.optim.AdamW(params)
    theirs.load_state_dict(saved)
    params[0].requires_grad_(True)
    advance(params, theirs, 1, seed=2)

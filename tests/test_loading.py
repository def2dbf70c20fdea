"""What a checkpoint decides and what the constructor does; all of a state is loaded, or nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import twins
from checkpoints import SHAPES, averages, fresh, network, train, trained, with_buffers
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from fused_ema import FusedEMA, FusedScaledAdamW, FusedScaledSGD

STORAGE = {
    "plain": {},
    "masters": {"master_weights": True},
    "bf16": {"ema_format": "bf16"},
    "delta": {"ema_format": "delta"},
    "delta-masters": {"ema_format": "delta", "master_weights": True},
    "all-bf16": {"ema_format": "bf16", "master_weights": True, "state_format": "bf16"},
}


@pytest.mark.parametrize("after", STORAGE)
@pytest.mark.parametrize("before", STORAGE)
def test_the_constructor_chooses_what_is_stored(before, after):
    params, opt = trained(dtype=torch.bfloat16, **STORAGE[before])
    others, other = fresh(params, **STORAGE[after])
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for field in ("master_weights", "ema_format", "state_format"):
        assert other.param_groups[0][field] == other.defaults[field]
    # a bfloat16 keeps 8 bits, a difference 10 bits of what is smaller than the weights
    for found, right in zip(averages(others, other), averages(params, opt), strict=True):
        torch.testing.assert_close(found, right, rtol=2**-8, atol=1e-7)
    twins.set_gradients(7, params, others)
    other.step()
    masters = "masters" in after or "all" in after
    for p, q in zip(params, others, strict=True):
        state = other.state[q]
        assert ("master" in state) == masters
        moments = {"all-bf16": torch.bfloat16}.get(after, torch.float32 if masters else p.dtype)
        assert state["exp_avg"].dtype == moments
        if masters and "master" not in opt.state[p]:  # it began at the parameter
            torch.testing.assert_close(state["master"], p.float(), rtol=0.0, atol=0.1)
    kept = {"bf16": torch.bfloat16, "delta": torch.float16}
    dtype = kept.get(STORAGE[after].get("ema_format", ""), torch.float32)
    assert all(other.state[q]["ema"].dtype == dtype for q in others)


def test_a_difference_to_masters_becomes_one_to_parameters():
    params, opt = trained(dtype=torch.bfloat16, ema_format="delta", master_weights=True)
    right = averages(params, opt)
    opt.param_groups[0]["master_weights"] = False
    opt.param_groups[0]["ema_decay"] = 1.0  # averages stay where they are
    twins.set_gradients(3, params)
    opt.step()
    for found, value in zip(averages(params, opt), right, strict=True):
        torch.testing.assert_close(found, value, rtol=0.0, atol=2**-15)


def test_a_loaded_difference_waits_for_the_weights():
    """The weights may be loaded after the optimizer, and saved again before a step."""
    params, opt = trained(ema_format="delta")
    right = averages(params, opt)
    others, other = fresh([torch.zeros_like(p) for p in params])
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    again, third = fresh(params)
    third.load_state_dict(copy.deepcopy(other.state_dict()))
    for found in (averages(others, other), averages(again, third)):
        for value, expected in zip(found, right, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("given", "saved"),
    [
        ({"kappa": 1.0}, {"kappa": 2.0}),
        ({"ema_decay": 0.99}, {"ema_decay": 0.9}),
        ({"ema_decay": (0.9, 0.99)}, {"ema_decay": 0.9}),
        ({"ema_decay": lambda t: 0.5}, {"ema_decay": 0.9}),
        ({"ema_order": "before"}, {}),
    ],
)
def test_another_value_than_the_given_one_is_told(given, saved):
    params, opt = trained(**saved)
    _, other = fresh(params, **given)
    (field,) = given
    with pytest.warns(UserWarning, match=rf"{field}=.* was given .* state dict's .* is loaded"):
        other.load_state_dict(opt.state_dict())
    assert other.param_groups[0][field] == opt.param_groups[0][field]


def test_what_was_not_given_or_is_the_same_loads_in_silence():
    params, opt = trained(kappa=2.0, max_grad_norm=3.0, ema_every=2)
    for options in ({}, {"kappa": 2}, {"ema_decay": 0.9}):
        _, other = fresh(params, **options)
        other.load_state_dict(opt.state_dict())
        assert (other.kappa, other.max_grad_norm, other.ema_every) == (2.0, 3.0, 2)


def test_group_fields_are_the_optimizers_own():
    params = twins.parameters(SHAPES, torch.float32)
    groups = [{"params": [p]} for p in params]
    opt = FusedScaledSGD(groups, ema_decay=0.9, max_grad_norm=1.0, ema_every=2)
    opt.max_grad_norm, opt.ema_every = 5.0, 3
    assert [(g["max_grad_norm"], g["ema_every"]) for g in opt.param_groups] == [(5.0, 3)] * 2
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="max_grad_norm="):
            opt.max_grad_norm = bad
    for group in opt.param_groups:  # what wrappers and schedulers write to
        group["max_grad_norm"] = 1e-3
    twins.set_gradients(0, params)
    before = [p.detach().clone() for p in params]
    opt.step()
    moved = sum(float((p.detach() - q).square().sum()) for p, q in zip(params, before, strict=True))
    assert moved**0.5 <= 1e-3 * opt.param_groups[0]["lr"] * 1.01
    opt.param_groups[0]["max_grad_norm"] = -1.0
    opt.param_groups[1]["max_grad_norm"] = -1.0
    after = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"max_grad_norm=-1\.0"):
        opt.step()
    opt.param_groups[0]["max_grad_norm"] = 2.0
    opt.param_groups[1]["max_grad_norm"] = 3.0
    with pytest.raises(ValueError, match="max_grad_norm differs between param groups"):
        opt.step()
    assert all(map(torch.equal, params, after))
    with pytest.raises(ValueError, match="ema_every differs between param groups"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "ema_every": 7})


def test_clipping_may_change_at_every_step_without_new_plans():
    params, opt = trained(max_grad_norm=1.0)
    plans = opt._stepper.plans
    opt.param_groups[0]["max_grad_norm"] = 0.5
    twins.set_gradients(2, params)
    opt.step()
    assert opt._stepper.plans is plans


def named(order, **options):
    params = dict(zip("ab", (nn.Parameter(torch.full((2,), v)) for v in (1.0, 2.0)), strict=True))
    return params, FusedScaledSGD([(n, params[n[-1]]) for n in order], ema_decay=0.5, **options)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_names_say_which_state_is_whose(prefix):
    params, opt = named("ab")
    opt.step()
    others, other = named([prefix + "b", prefix + "a"])
    other.load_state_dict(opt.state_dict())
    for name, p in params.items():
        assert torch.equal(other.state[others[name]]["ema"], opt.state[p]["ema"])
    assert other.param_groups[0]["param_names"] == [prefix + "b", prefix + "a"]


def test_other_names_are_refused():
    _, opt = named("ab")
    opt.step()
    _, other = named(["a", "x.b"])
    with pytest.raises(ValueError, match=r"param_names of group 0: 'x.b' is missing"):
        other.load_state_dict(opt.state_dict())
    assert not other.state


def test_a_teacher_without_a_saved_average_is_told():
    params, _ = trained(0)
    torchs = torch.optim.AdamW(params, lr=1e-2)
    twins.set_gradients(0, params)
    torchs.step()
    teacher = [torch.zeros_like(p) for p in params]
    opt = FusedScaledAdamW(params, ema_decay=0.9, teacher=teacher)
    with pytest.warns(UserWarning, match="no average for the teacher, .* copy the weights into it"):
        opt.load_state_dict(torchs.state_dict())
    fresh_one = FusedScaledAdamW(
        params, ema_decay=0.9, teacher=[torch.zeros_like(p) for p in params]
    )
    fresh_one.load_state_dict(trained(0)[1].state_dict())  # saved before its first step


@pytest.mark.parametrize("cls", [torch.optim.AdamW, FusedScaledAdamW])
def test_users_entries_are_saved_and_loaded(cls):
    params, _ = trained(0)
    opt = cls(params)
    twins.set_gradients(0, params)
    opt.step()
    opt.state["count"] = 3
    opt.state["trainer"] = {"step": 7}
    opt.state[params[0]]["teacher"] = torch.ones(2)
    opt.state[params[0]]["nested"] = {"a": torch.ones(3), "none": None}
    other = cls(params)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    twins.set_gradients(1, params)
    other.step()
    assert (other.state["count"], other.state["trainer"]) == (3, {"step": 7})
    state = other.state[params[0]]
    assert torch.equal(state["teacher"], torch.ones(2))
    assert torch.equal(state["nested"]["a"], torch.ones(3))
    assert state["nested"]["none"] is None


def test_a_post_hook_may_return_anything():
    params = twins.parameters(SHAPES, torch.float32)
    opt = FusedScaledSGD(params, momentum=0.9, ema_decay=0.9)
    opt.step()
    opt.register_state_dict_post_hook(lambda _, saved: {"momentum": saved["state"][0]})
    assert opt.state_dict()["momentum"]["momentum_buffer"] is None


@pytest.mark.parametrize(
    "flags", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}]
)
def test_averaged_buffers_pass_through_distributed_checkpoints(flags):
    options = StateDictOptions(**flags)
    model = network()
    opt = with_buffers(model, ema_decay=(0.9, 0.5))
    train(model, opt, 3)
    saved = copy.deepcopy(get_state_dict(model, opt, options=options))
    other = network()
    resumed = with_buffers(other, ema_decay=(0.9, 0.5))
    get_state_dict(other, resumed, options=options)  # makes its state
    set_state_dict(
        other, resumed, model_state_dict=saved[0], optim_state_dict=saved[1], options=options
    )
    for m, o in ((model, opt), (other, resumed)):
        train(m, o, 1, seed=1)
    for index in (0, 1):
        right, found = opt.ema_state_dict(model, index), resumed.ema_state_dict(other, index)
        assert not torch.equal(right["1.running_mean"], model[1].running_mean)
        assert all(torch.equal(right[key], found[key]) for key in right)


def test_a_loaded_state_is_saved_as_it_was():
    for teacher in (None, network()):
        model = network()
        opt = with_buffers(model, teacher=teacher)
        train(model, opt, 2)
        saved = copy.deepcopy(opt.state_dict())
        other = network()
        resumed = with_buffers(other, teacher=None if teacher is None else network())
        resumed.load_state_dict(saved)
        assert str(resumed.state_dict()["state"]) == str(saved["state"])
        assert "1.running_mean" in saved["state"][0]["ema_buffers"]["0"]


def test_buffers_that_are_not_kept_are_told():
    model = network()
    opt = with_buffers(model)
    train(model, opt, 1)
    plain = FusedScaledAdamW(model.parameters(), ema_decay=0.9)
    plain.load_state_dict(opt.state_dict())
    assert str(plain.state_dict()["state"]) == str(opt.state_dict()["state"])
    with pytest.warns(UserWarning, match="holds averaged buffers, and they are not kept"):
        train(model, plain, 1)
    assert "ema_buffers" not in plain.state_dict()["state"][0]
    left = with_buffers(model, ema_buffers="copy")
    with pytest.warns(UserWarning, match="holds averaged buffers, and they are not kept"):
        left.load_state_dict(opt.state_dict())


def test_another_optimizer_takes_the_state_of_averaged_buffers():
    model = network()
    opt = with_buffers(model)
    train(model, opt, 1)
    theirs = torch.optim.AdamW(model.parameters())
    theirs.load_state_dict(opt.state_dict())
    train(model, theirs, 1)
    back = with_buffers(model)
    back.load_state_dict(theirs.state_dict())
    held = opt.ema_state_dict(model)["1.running_mean"]
    assert torch.equal(back.ema_state_dict(model)["1.running_mean"], held)


def test_a_loaded_state_without_averages_begins_them_at_the_next_step():
    params, plain = trained(ema_decay=None)
    averaged = FusedScaledAdamW(params, lr=1e-2, ema_decay=0.9)
    averaged.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for p in params:
            p.fill_(7.0)
    twins.set_gradients(0, params)
    averaged.step()
    for p in params:
        right = 0.9 * 7.0 + 0.1 * p.detach()
        torch.testing.assert_close(averaged.state[p]["ema"], right, rtol=1e-6, atol=0.0)


def test_following_another_optimizer_loads_the_same_way():
    params = twins.parameters(SHAPES, torch.float32)
    opt = torch.optim.SGD(params, lr=0.1)
    ema = FusedEMA(opt, 0.9, ema_format="bf16")
    twins.set_gradients(0, params)
    opt.step()
    other = FusedEMA(torch.optim.SGD(params, lr=0.1), 0.5)
    with pytest.warns(UserWarning, match=r"ema_decay=0\.5 was given"):
        other.load_state_dict(ema.state_dict())
    assert other.state[params[0]]["ema"].dtype == torch.float32
    assert torch.equal(other.state[params[0]]["ema"], ema.state[params[0]]["ema"].float())

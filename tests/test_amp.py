"""torch's GradScaler drives an optimizer as it drives torch's own, with and without fused=True."""

from __future__ import annotations

import math
import pickle
from copy import deepcopy
from inspect import signature

import pytest
import torch
import twins
from optimizers import each_in_torch
from torch import nn

import fused_ema

SHAPES = ((), (7,), (5, 3))
FLAGS = [{}, {"fused": False}, {"foreach": True}, {"fused": True}]
SCALERS = [torch.amp.GradScaler, fused_ema.GradScaler]


def running(kind=torch.amp.GradScaler) -> torch.amp.GradScaler:
    scaler = kind("cpu", init_scale=64.0, growth_interval=2)
    scaler.scale(torch.zeros(()))
    return scaler


def says(opt) -> bool:
    """What trainers ask."""
    return getattr(opt, "_step_supports_amp_scaling", False)


class Loop:
    """Two models' optimizers under one scaler, for torch's classes or ours."""

    def __init__(self, make, kind) -> None:
        self.params = [twins.parameters(SHAPES, torch.float64, seed=seed) for seed in (1, 2)]
        self.opts = [make(params) for params in self.params]
        self.scaler = running(kind)
        self.norms: list[torch.Tensor] = []

    def step(self, number: int, clip: bool, overflow: bool) -> None:
        for params in self.params:
            twins.set_gradients(number, params)
            for p in params:
                p.grad.mul_(self.scaler.get_scale())
        if overflow:
            self.params[0][1].grad[2] = math.inf
        for opt, params in zip(self.opts, self.params, strict=True):
            if clip:
                self.scaler.unscale_(opt)
                self.norms.append(nn.utils.clip_grad_norm_(params, 0.5))
            self.scaler.step(opt)
        self.scaler.update()


@pytest.mark.parametrize("kind", SCALERS)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@each_in_torch
def test_two_optimizers_under_one_scaler_step_as_torchs(optimizer, flags, kind):
    kwargs = {"lr": 0.1, **optimizer.options}
    loop = Loop(lambda params: optimizer.ours(params, **kwargs, **flags), kind)
    # not torch's fused SGD, whose buffers are uninitialised memory after a skipped first step
    twin = Loop(lambda params: optimizer.theirs(params, **kwargs), torch.amp.GradScaler)
    for number in range(8):
        how = {"clip": number in (1, 2, 5), "overflow": number in (0, 3, 5)}
        loop.step(number, **how)
        twin.step(number, **how)
        assert loop.scaler.get_scale() == twin.scaler.get_scale()
        for mine, other in zip(loop.params, twin.params, strict=True):
            for p, q in zip(mine, other, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(loop.norms, twin.norms, rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("kind", SCALERS)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_the_step_clips_unscaled_gradients(flags, kind):
    options = {"lr": 0.1, "ema_decay": 0.5, **flags}
    loop = Loop(lambda ps: fused_ema.FusedScaledAdamW(ps, max_grad_norm=0.5, **options), kind)
    twin = Loop(lambda ps: fused_ema.FusedScaledAdamW(ps, **options), torch.amp.GradScaler)
    for number in range(4):
        overflow = number == 2
        loop.step(number, clip=False, overflow=overflow)
        twin.step(number, clip=True, overflow=overflow)
        for opt, other in zip(loop.opts, twin.opts, strict=True):
            opt.state_dict()  # settles the count
            twins.assert_same(opt, other, rtol=1e-12, atol=1e-13)
            if not overflow:
                norm = twin.norms[-2 + loop.opts.index(opt)]
                torch.testing.assert_close(opt.grad_norm, norm, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@each_in_torch
def test_trainers_hear_what_torchs_says(optimizer, flags):
    """Where torch's has no ``fused``, ours unscales itself when it is told so."""
    params = twins.parameters(SHAPES, torch.float64)
    ours = optimizer.ours(params, **optimizer.options, **flags)
    known = flags.keys() & signature(optimizer.theirs).parameters.keys()
    theirs = optimizer.theirs(params, **optimizer.options, **{name: flags[name] for name in known})
    assert says(ours) is (says(theirs) if known == flags.keys() else flags["fused"])


def test_it_is_said_of_the_present_groups():
    first, second = twins.parameters(((3,), (3,)), torch.float64)
    opt = fused_ema.FusedScaledAdam([first], fused=True)
    plain = fused_ema.FusedScaledAdam([first])
    opt.load_state_dict(plain.state_dict())
    plain.load_state_dict(opt.state_dict())
    assert (says(opt), says(plain)) == (True, False)
    for copy in (deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert says(copy)
    opt.add_param_group({"params": [second], "foreach": True, "fused": None})
    assert not says(opt)
    opt.param_groups[1].update(foreach=None, fused=True)
    assert says(opt)
    opt._step_supports_amp_scaling = False  # a user who clips decides
    assert not says(opt)
    assert not says(fused_ema.FusedScaledAdam)


@pytest.mark.parametrize("given", [{}, {"_step_supports_amp_scaling": False}], ids=str)
def test_our_scaler_leaves_what_the_optimizer_says(given):
    (p,) = twins.parameters(((3,),), torch.float64)
    opt = fused_ema.FusedScaledSGD([p], ema_decay=0.5)
    vars(opt).update(given)
    heard = []
    opt.register_step_pre_hook(lambda *_: heard.append((says(opt), float(opt.grad_scale))))
    scaler = running(fused_ema.GradScaler)
    p.grad = torch.ones_like(p)
    scaler.step(opt)
    scaler.update()
    with opt.ema_weights(), pytest.raises(RuntimeError):
        scaler.step(opt)
    scaler.step(opt)  # after a step that raised the scale is told once again, not twice
    assert set(heard) == {(True, 64.0)}
    assert not says(opt)
    assert ("_step_supports_amp_scaling" in vars(opt)) is bool(given)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_a_wrapper_that_watches_step_sees_what_it_sees_of_torchs(flags):
    """Such as sets ``optimizer_step_was_skipped``: a skipped step is one that is not called."""
    seen = []
    for cls in (fused_ema.FusedScaledAdamW, torch.optim.AdamW):
        (p,) = twins.parameters(((3,),), torch.float64)
        opt, scaler, calls = cls([p], **flags), running(), []
        original = opt.step

        def patched(*args, step=original, calls=calls):
            calls.append(args)
            return step(*args)

        opt.step = patched
        for value in (1.0, math.inf, 1.0):
            p.grad = torch.full_like(p, value)
            scaler.step(opt)
            scaler.update()
            calls.append("updated")
        seen.append(calls)
    assert seen[0] == seen[1]
    assert seen[0].count(()) == (3 if flags == {"fused": True} else 2)

"""Trust ratios of LARS and LAMB: which steps they lengthen, and of which gradients they are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import twins
from torch import nn

import fused_ema
from fused_ema import FusedScaledLAMB, FusedScaledLARS, FusedScaledSGD, scaling, trust_groups
from fused_ema.sharding import Sharding
from fused_ema.step.backends import select

SHAPES = ((4, 3), (5,), (), (70, 90))
OPTIMIZERS = {
    "lars": (FusedScaledLARS, {"lr": 0.5, "trust_coefficient": 0.1, "weight_decay": 0.1}),
    "lamb": (FusedScaledLAMB, {"lr": 0.1, "weight_decay": 0.1}),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def made(name: str, params: Any, **options: Any):
    cls, own = OPTIMIZERS[name]
    return cls(params, **{**own, **options})


def length(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().norm())


def test_a_step_of_lamb_is_as_long_as_its_rate_of_the_weights(backend):
    params = twins.parameters(SHAPES, torch.float32)
    before = [p.detach().clone() for p in params]
    opt = made("lamb", params, lr=0.25, kappa=4.0, backend=backend)
    twins.set_gradients(0, params)
    opt.step()
    for p, old in zip(params, before, strict=True):
        assert length(p - old) == pytest.approx(0.25 * 2.0 * length(old), rel=1e-5)


def test_a_step_of_lars_is_as_long_as_its_rate_of_the_weights(backend):
    params = twins.parameters(SHAPES, torch.float32)
    before = [p.detach().clone() for p in params]
    opt = made("lars", params, lr=0.25, kappa=4.0, weight_decay=0.0, eps=0.0, backend=backend)
    twins.set_gradients(0, params)
    opt.step()
    for p, old in zip(params, before, strict=True):
        assert length(p - old) == pytest.approx(0.25 * 4.0 * 0.1 * length(old), rel=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_without_ratios_is_sgd(nesterov, backend):
    shared = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov, "kappa": 3.0}
    lists = [twins.parameters(SHAPES, torch.float32) for _ in "ab"]
    opts = [
        FusedScaledLARS(lists[0], adapt=False, backend=backend, **shared),
        FusedScaledSGD(lists[1], backend=backend, **shared),
    ]
    for step in range(3):
        twins.set_gradients(step, *lists)
        for opt in opts:
            opt.step()
    assert all(map(torch.equal, *lists))


@each_optimizer
def test_norms_of_nothing_leave_the_step_as_it_is(name, backend):
    """Zero weights move as without a ratio, and zero gradients move what decays."""
    lists = [[nn.Parameter(torch.zeros(7)), nn.Parameter(torch.ones(7))] for _ in "ab"]
    opts = [
        made(name, params, adapt=adapt, backend=backend)
        for params, adapt in zip(lists, (True, False), strict=True)
    ]
    for params in lists:
        params[0].grad, params[1].grad = torch.ones(7), torch.zeros(7)
    for opt in opts:
        opt.step()
    assert torch.equal(lists[0][0], lists[1][0])
    assert bool((lists[0][0] < 0).all())
    assert torch.equal(lists[0][1], lists[1][1]) == (name == "lars")
    assert bool((lists[0][1] < 1).all())


@each_optimizer
def test_infinite_weights_stay_and_the_others_move_without_a_ratio(name, backend):
    p, q = nn.Parameter(torch.tensor([math.inf, 1.0])), nn.Parameter(torch.tensor([2.0, 1.0]))
    for param, adapt in ((p, True), (q, False)):
        param.grad = torch.ones(2)
        made(name, [param], adapt=adapt, weight_decay=0.0, backend=backend).step()
    assert p[0] == math.inf
    assert p[1] == q[1]


@each_optimizer
@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_squares_of_norms_may_leave_the_format(name, size, backend):
    p = nn.Parameter(torch.full((5000,), size))
    p.grad = torch.full((5000,), 1e19 if size > 1.0 else 1e5)
    opt = made(name, [p], weight_decay=0.0, eps=1e-6 if name == "lamb" else 0.0, backend=backend)
    opt.step()
    share = 0.1 if name == "lamb" else 0.5 * 0.1
    torch.testing.assert_close(p.detach(), torch.full((5000,), size * (1 - share)))


@each_optimizer
def test_ratios_are_those_of_clipped_gradients(name, backend):
    """In LARS, eps makes a difference of their length."""
    eps = {"eps": 0.5} if name == "lars" else {"eps": 1e-2}
    lists = [twins.parameters(SHAPES, torch.float32) for _ in "ab"]
    opt = made(name, lists[0], max_grad_norm=0.7, backend=backend, **eps)
    twin = made(name, lists[1], backend=backend, **eps)
    for step in range(3):
        twins.set_gradients(step, *lists)
        nn.utils.clip_grad_norm_(lists[1], 0.7)
        opt.step()
        twin.step()
    for p, q in zip(*lists, strict=True):
        torch.testing.assert_close(p, q)


@each_optimizer
def test_ratios_are_those_of_unscaled_gradients(name, backend):
    lists = [twins.parameters(SHAPES, torch.float32) for _ in "ab"]
    opt, twin = (made(name, params, backend=backend, eps=1e-2) for params in lists)
    scaler = fused_ema.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        twins.set_gradients(step, *lists)
        for p in lists[0]:
            p.grad.mul_(scaler.get_scale() if step else 8.0)
        if step == 2:
            lists[0][1].grad[0] = math.inf  # of a step that is skipped
        scaler.scale(torch.zeros(()))
        scaler.step(opt)
        scaler.update()
        if step != 2:
            twin.step()
        for p, q in zip(*lists, strict=True):
            torch.testing.assert_close(p, q)
            for key, value in twin.state[q].items():
                if key == "step":  # taken back when it is needed
                    continue
                torch.testing.assert_close(opt.state[p][key], value)


@each_optimizer
def test_a_group_of_many_chunks_adapts_as_one_tensor(name, backend):
    """Also beside other groups and parameters without a gradient."""
    big = nn.Parameter(torch.linspace(-1.0, 2.0, 20_001))
    rest = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    old = big.detach().clone()
    options = {"weight_decay": 0.0, "lr": 0.1, "backend": backend}
    opt = made(name, [{"params": [rest[0], big, rest[1]]}, {"params": rest[2:]}], **options)
    big.grad, rest[2].grad = torch.linspace(0.5, 1.0, 20_001), torch.ones(3)
    opt.step()
    share = 0.1 if name == "lamb" else 0.1 * 0.1
    assert length(big - old) == pytest.approx(share * length(old), rel=1e-5)
    assert torch.equal(rest[0], torch.ones(3))


@pytest.mark.parametrize("kappa", [0.25, 1.0, 4.0])
def test_lambs_decay_is_the_first_order_of_adamws(kappa):
    found = scaling.normalized_weight_decay(0.1, kappa)
    assert found == math.sqrt(kappa) * 0.1
    exact = scaling.adaptive_weight_decay(1e-9, 0.1, kappa, "exact")
    assert found == pytest.approx(exact, rel=1e-7)


def test_groups_of_a_module():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    adapted, others = trust_groups(model)
    assert [name for name, _ in adapted["params"]] == ["0.weight", "2.weight"]
    assert [name for name, _ in others["params"]] == ["0.bias", "1.weight", "1.bias"]
    opt = FusedScaledLARS(trust_groups(model), lr=0.1, weight_decay=0.2)
    fields = [(group["adapt"], group["weight_decay"]) for group in opt.param_groups]
    assert fields == [(True, 0.2), (False, 0.0)]
    assert [len(group["params"]) for group in trust_groups(model[2].parameters())] == [1]


@each_optimizer
def test_adapt_is_a_switch(name):
    with pytest.raises(ValueError, match="adapt='no' is not known; allowed: True or False"):
        made(name, [nn.Parameter(torch.ones(2))], adapt="no")


@pytest.mark.parametrize("field", ["trust_coefficient", "eps"])
def test_bad_numbers_of_the_ratio_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=-1.0 is out of range"):
        made("lars", [nn.Parameter(torch.ones(2))], **{field: -1.0})


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="nesterov=True requires momentum > 0; received"):
        made("lars", [nn.Parameter(torch.ones(2))], momentum=0.0, nesterov=True)


@each_optimizer
def test_parts_of_parameters_have_no_norm(name):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    opt = made(name, [p], backend="reference")
    opt.step()
    bucket: Any = opt._stepper.plans[0].bucket
    mesh: Any = None

    def placed(*dims: int):
        return replace(bucket, key=bucket.key._replace(sharding=Sharding(mesh, dims)))

    assert select(placed()).NAME == "reference"
    with pytest.raises(RuntimeError, match=f"rule '{name}' takes norms of whole parameters"):
        select(placed(0))


@each_optimizer
def test_a_state_goes_on_where_it_was_saved(name, backend):
    lists = [twins.parameters(SHAPES, torch.float32) for _ in "ab"]
    opts = [made(name, params, ema_decay=0.9, backend=backend) for params in lists]
    for step in range(4):
        twins.set_gradients(step, *lists)
        opts[0].step()
        if step == 1:
            for p, q in zip(*lists, strict=True):
                q.data.copy_(p.data)
            opts[1].load_state_dict(opts[0].state_dict())
        elif step > 1:
            opts[1].step()
    assert all(map(torch.equal, *lists))

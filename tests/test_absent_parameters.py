"""Parameters without values, on the meta device or before a lazy module's first forward."""

from __future__ import annotations

import pytest
import torch
import twins
from optimizers import each_optimizer
from torch import nn

import fused_ema

BACKENDS = ["auto", "native", "foreach", "reference"]


def with_gradient(device: str = "cpu") -> nn.Parameter:
    p = nn.Parameter(torch.ones(3, device=device))
    p.grad = torch.ones(3, device=device)
    return p


@pytest.mark.parametrize("chosen", BACKENDS)
def test_a_meta_parameter_without_a_gradient_is_left_alone(chosen):
    p, q = with_gradient(), with_gradient()
    meta, other = (nn.Parameter(torch.ones(3, device="meta")) for _ in "ab")
    options = {"ema_decay": 0.5, "max_grad_norm": 1.0, "ema_format": "bf16"}
    opt = fused_ema.FusedScaledAdamW([meta, p], lr=0.1, backend=chosen, **options)
    twin = torch.optim.AdamW([other, q], lr=0.1)
    opt.step()
    nn.utils.clip_grad_norm_([q], 1.0)
    twin.step()
    torch.testing.assert_close(p, q)
    assert list(opt.state) == [p]
    assert opt.state_dict()["state"].keys() == twin.state_dict()["state"].keys()


@each_optimizer
def test_a_meta_parameter_with_a_gradient_is_stepped_as_by_torchs_foreach(optimizer):
    p, meta = with_gradient(), with_gradient("meta")
    opt = optimizer.ours([meta, p], lr=0.1, ema_decay=0.5, **optimizer.options)
    opt.step()
    assert opt.backends == ("foreach", "native")
    assert opt.state[meta]["ema"].is_meta
    assert not torch.equal(p, torch.ones(3))


def test_what_has_no_values_cannot_be_rounded():
    p, meta = with_gradient(), with_gradient("meta")
    opt = fused_ema.FusedScaledSGD([p, meta], ema_decay=0.5, ema_format="bf16")
    with pytest.raises(RuntimeError, match="16-bit formats on the meta device"):
        opt.step()
    assert torch.equal(p, torch.ones(3))


def test_a_meta_parameter_that_comes_to_memory_is_stepped():
    module, other = nn.Linear(2, 1, device="meta"), with_gradient()
    opt = fused_ema.FusedScaledSGD([other, *module.parameters()], lr=0.1, ema_decay=0.5)
    opt.step()
    weight = module.weight
    torch.utils.swap_tensors(weight, nn.Parameter(torch.ones(1, 2)))
    opt.step()
    assert torch.equal(opt.state[weight]["ema"], torch.ones(1, 2))
    weight.grad = torch.ones(1, 2)
    opt.step()
    torch.testing.assert_close(weight.detach(), torch.full((1, 2), 0.9))


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("kind", ["fused", "any"])
def test_a_lazy_parameter_is_followed_from_the_first_step_at_which_it_exists(kind, chosen):
    module = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    if kind == "fused":
        ema = opt = fused_ema.FusedScaledAdamW(
            module.parameters(), ema_decay=0.5, max_grad_norm=9.0, backend=chosen
        )
    else:
        opt = torch.optim.AdamW(module.parameters())
        ema = fused_ema.FusedEMA(opt, 0.5, backend=chosen)
    opt.step()
    opt.step()
    assert module[0].weight not in ema.state
    assert ema.state[module[1].weight]["ema"] is not None
    ema.load_state_dict(ema.state_dict())
    module(torch.ones(4, 5)).sum().backward()
    starts = [p.detach().clone() for p in module.parameters()]
    opt.step()
    for p, start in zip(module.parameters(), starts, strict=True):
        assert not torch.equal(p, start)
        torch.testing.assert_close(ema.state[p]["ema"], (p.detach() + start) / 2)


def lazy_network(kind=nn.LazyLinear, norm=nn.LazyBatchNorm1d, **options):
    torch.manual_seed(0)
    first = kind(3) if kind is nn.LazyLinear else kind(5, 3)
    module = nn.Sequential(
        first, norm() if norm is nn.LazyBatchNorm1d else norm(3), nn.Linear(3, 2)
    )
    options = {"lr": 0.125, "ema_decay": 0.5, "model": module, "ema_buffers": "average", **options}
    return module, fused_ema.FusedScaledAdamW(module.parameters(), **options)


def train(module, opt, steps=2):
    for _ in range(steps):
        opt.zero_grad()
        module(torch.linspace(-1, 1, 20).view(4, 5).sin()).sum().backward()
        opt.step()


def read(module, opt):
    """All calls that read an average, or bring back a state."""
    with opt.ema_weights():
        pass
    assert opt.ema_state_dict(module).keys() == module.state_dict().keys()
    opt.load_state_dict(opt.state_dict())
    opt.copy_ema_to(module)


def test_lazy_buffers_are_followed_like_those_of_a_module_that_is_there():
    module, opt = lazy_network()
    read(module, opt)
    opt.step()
    read(module, opt)
    module(torch.ones(4, 5))
    there, twin = lazy_network(nn.Linear, nn.BatchNorm1d)
    there.load_state_dict(module.state_dict())
    # the twin's first step is the lazy one's second: what is not lazy has begun before, alike
    for each, its in ((module, opt), (there, twin)):
        train(each, its)
        read(each, its)
        train(each, its)
    found, expected = opt.ema_state_dict(module), twin.ema_state_dict(there)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_lazy_module_that_comes_to_be_while_an_average_is_read():
    module, opt = lazy_network()
    with opt.ema_weights():
        module(torch.ones(4, 5))
    start = module[0].weight.detach().clone()
    train(module, opt, 1)
    expected = (start + module[0].weight.detach()) / 2
    torch.testing.assert_close(opt.state[module[0].weight]["ema"], expected)


@pytest.mark.parametrize("ema_format", ["full", "bf16", "delta"])
def test_a_state_loads_before_the_first_forward(ema_format):
    module, opt = lazy_network(ema_format=ema_format)
    train(module, opt)
    other, resumed = lazy_network(ema_format=ema_format)
    resumed.load_state_dict(opt.state_dict())
    other.load_state_dict(module.state_dict())
    for each, its in ((module, opt), (other, resumed)):
        train(each, its)
    found, expected = resumed.ema_state_dict(other), opt.ema_state_dict(module)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_state_of_another_shape_than_a_lazy_parameter_gets_moves_nothing():
    module, opt = lazy_network(norm=nn.BatchNorm1d)
    train(module, opt)
    other, resumed = lazy_network(norm=nn.BatchNorm1d)
    resumed.load_state_dict(opt.state_dict())
    other(torch.ones(4, 6)).sum().backward()
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(RuntimeError, match=r"shape \(3, 5\), its parameter \(3, 6\)"):
        resumed.step()
    assert all(map(torch.equal, before, other.parameters()))


def test_what_needs_shapes_says_so():
    module, opt = lazy_network()
    train(module, opt)
    lazy, its = lazy_network()
    for call in (
        lambda: opt.copy_ema_to(lazy),
        lambda: lazy_network(teacher=lazy),
        lambda: fused_ema.load_ema(its, lazy, opt.ema_state_dict(module)),
    ):
        with pytest.raises(ValueError, match="has no shape yet; allowed: after the first forward"):
            call()


def test_lazy_parameters_step_as_torchs():
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.LazyLinear(3)) for _ in "ab"]
    kinds = fused_ema.FusedScaledAdamW, torch.optim.AdamW
    opts = [cls(m.parameters(), lr=0.1) for cls, m in zip(kinds, modules, strict=True)]
    for opt, module in zip(opts, modules, strict=True):
        opt.step()
        module(torch.ones(1, 2))
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(1.0)
    params, others = (list(module.parameters()) for module in modules)
    for step in range(3):
        twins.set_gradients(step, params, others)
        for opt in opts:
            opt.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


def test_a_plan_looks_for_absent_parameters_alone(monkeypatch):
    asked = []
    real = fused_ema.step.stepper.is_there
    monkeypatch.setattr(
        "fused_ema.step.stepper.is_there", lambda param: asked.append(param) or real(param)
    )
    p, meta = with_gradient(), nn.Parameter(torch.ones(3, device="meta"))
    opt = fused_ema.FusedScaledSGD([p, meta])
    opt.step()
    asked.clear()
    opt.step()
    assert len(asked) == 1
    assert asked[0] is meta

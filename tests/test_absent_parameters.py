"""Parameters without values, on the meta device or before a lazy module's first forward."""

from __future__ import annotations

import pytest
import torch
import twins
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


@pytest.mark.parametrize("cls", [fused_ema.FusedScaledSGD, fused_ema.FusedScaledAdamW])
def test_a_meta_parameter_with_a_gradient_is_stepped_as_by_torchs_foreach(cls):
    p, meta = with_gradient(), with_gradient("meta")
    opt = cls([meta, p], lr=0.1, ema_decay=0.5)
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
    real = fused_ema.stepper.is_there
    monkeypatch.setattr(
        "fused_ema.stepper.is_there", lambda param: asked.append(param) or real(param)
    )
    p, meta = with_gradient(), nn.Parameter(torch.ones(3, device="meta"))
    opt = fused_ema.FusedScaledSGD([p, meta])
    opt.step()
    asked.clear()
    opt.step()
    assert len(asked) == 1
    assert asked[0] is meta

"""A first step that is not taken lets nothing begin: weights that are loaded after it count."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fused_ema import FusedEMA, FusedScaledAdamW


def make(backend: str = "auto", **options: Any) -> tuple[nn.Module, FusedScaledAdamW]:
    torch.manual_seed(0)
    dtype = options.pop("dtype", torch.float32)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
    options = {"model": model, "ema_buffers": "average", "fused": backend == "auto", **options}
    return model, FusedScaledAdamW(model.parameters(), ema_decay=0.5, backend=backend, **options)


def set_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def skipped(model: nn.Module, opt: FusedScaledAdamW) -> None:
    set_gradients(model)
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    del opt.found_inf


def refused(model: nn.Module, opt: FusedScaledAdamW) -> None:
    set_gradients(model)
    model[1].bias.grad = torch.ones(2, dtype=model[1].bias.dtype).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()


def checked(model: nn.Module, opt: FusedScaledAdamW) -> None:
    set_gradients(model)
    opt.check_gradients()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema_format": "delta"},
        {"dtype": torch.bfloat16, "master_weights": True},
        {"ema_order": "before", "backend": "foreach"},
    ],
    ids=str,
)
@pytest.mark.parametrize("untaken", [skipped, refused, checked])
def test_nothing_begins(untaken: Callable[..., None], options: dict[str, Any]) -> None:
    pairs = [make(**options), make(**options)]
    untaken(*pairs[0])
    assert not pairs[0][1].state_dict()["state"]
    for model, opt in pairs:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(3)
        set_gradients(model)
        assert torch.equal(opt.ema_state_dict(model)["0.weight"].float(), torch.full((2, 3), 3.0))
        opt.step()
    (model, opt), (twin, other) = pairs
    for name, value in other.ema_state_dict(twin).items():
        assert torch.equal(opt.ema_state_dict(model)[name], value), name
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_nothing_begins_beside_an_optimizer_that_fails():
    model, _ = make()
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    ema = FusedEMA(inner, 0.5)
    set_gradients(model)
    with pytest.raises(ZeroDivisionError):
        inner.step(lambda: 1 / 0)
    nn.utils.vector_to_parameters(torch.full((12,), 3.0), model.parameters())
    inner.step()
    assert torch.equal(ema.ema_state_dict(model)["0.weight"], torch.full((2, 3), 3.0))


def test_a_later_step_that_is_skipped_keeps_what_has_begun():
    model, opt = make()
    set_gradients(model)
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    opt.param_groups[0]["amsgrad"] = True  # plans are made anew, with more states
    skipped(model, opt)
    after = opt.state_dict()
    for entry, found in zip(before["state"].values(), after["state"].values(), strict=True):
        assert entry.keys() == found.keys()
    assert torch.equal(before["state"][0]["ema"], after["state"][0]["ema"])

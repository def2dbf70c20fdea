"""Optimizers to load states into."""

from __future__ import annotations

import torch
import twins
from torch import nn

from fused_ema import FusedScaledAdamW

SHAPES = ((3, 4), (5,))


def trained(steps: int = 2, dtype: torch.dtype = torch.float32, **options):
    """Parameters and their optimizer after some steps."""
    params = twins.parameters(SHAPES, dtype)
    opt = FusedScaledAdamW(params, **{"lr": 1e-2, "ema_decay": 0.9, **options})
    for step in range(steps):
        twins.set_gradients(step, params)
        opt.step()
    return params, opt


def fresh(params, **options):
    """An optimizer of copies of the parameters."""
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    return copies, FusedScaledAdamW(copies, **{"lr": 1e-2, "ema_decay": 0.9, **options})


def averages(params, opt):
    model = nn.ParameterList(params)
    return [value.double() for value in opt.ema_state_dict(model).values()]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def with_buffers(model, **options):
    extra = {"model": model, "ema_buffers": "average", "ema_decay": 0.9, **options}
    return FusedScaledAdamW(model.parameters(), lr=1e-2, **extra)


def train(model, opt, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        opt.zero_grad()
        model(torch.randn(8, 3, generator=generator) + 3.0).square().sum().backward()
        opt.step()

"""Steps with something replaced in between, beside the same steps without."""

from __future__ import annotations

import torch
from torch import nn

from fused_ema import FusedScaledAdamW

STATES = ("exp_avg", "exp_avg_sq", "ema")


def parameters(shapes=((3, 4), (5,), ()), dtype=torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give_gradients(params, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def make(params, backend: str, **kwargs) -> FusedScaledAdamW:
    return FusedScaledAdamW(params, lr=0.1, ema_decay=0.9, backend=backend, **kwargs)


def assert_alike(params, optimizer, others, reference) -> None:
    """Parameters and averages agree with an optimizer that saw no replacement."""
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), q.detach().to(p.dtype), rtol=1e-6, atol=1e-6)
        for key in STATES:
            expected = reference.state[q][key].to(optimizer.state[p][key].dtype)
            torch.testing.assert_close(optimizer.state[p][key], expected, rtol=1e-6, atol=1e-6)


def run_with(backend: str, replace, shapes=((3, 4), (5,), ()), prepare=lambda params: None):
    """Two steps with `replace(params, optimizer)` between them, beside two plain ones."""
    params, others = parameters(shapes), parameters(shapes)
    prepare(params)
    optimizer, reference = make(params, backend), make(others, "reference")
    for p, q in ((params, optimizer), (others, reference)):
        give_gradients(p, seed=1)
        q.step()
    before = [p.detach() for p in params]
    replace(params, optimizer)
    values = [tensor.clone() for tensor in before]
    for p, q in ((optimizer.param_groups[0]["params"], optimizer), (others, reference)):
        give_gradients(p, seed=2)
        q.step()
    assert_alike(optimizer.param_groups[0]["params"], optimizer, others, reference)
    return before, values

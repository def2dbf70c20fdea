"""The centered form of RMSProp where the variance is none, or cannot be told."""

from __future__ import annotations

import math

import pytest
import torch

from fused_ema import FusedScaledRMSprop


def weight_after(backend: str, grad: float, square: float, mean: float, alpha: float) -> float:
    """A weight that was 1, a step later: lr is 1, eps 1/2."""
    p = torch.ones(3, requires_grad=True)
    opt = FusedScaledRMSprop([p], 1.0, alpha, 0.5, centered=True, backend=backend)
    p.grad = torch.zeros(3)
    opt.step()
    opt.state[p]["square_avg"].fill_(square)
    opt.state[p]["grad_avg"].fill_(mean)
    p.grad = torch.full((3,), grad)
    opt.step()
    assert set(opt.backends) == {backend}
    assert len(set(map(repr, p.tolist()))) == 1
    return p[0].item()


@pytest.mark.parametrize(
    ("square", "mean", "change"),
    [
        (1.0, 0.0, 0.25 / 1.5),
        (4.0, 1.75**0.5, 0.25 / 2.0),
        (1.0, 1.0, 0.25 / 0.5),
        (1.0, 1.001, 0.25 / 0.5),  # where torch takes the root of less than nothing
        (math.inf, 1e30, 0.0),
        (math.inf, math.inf, 0.0),
        (3e38, 1e30, 0.25 / 0.5),
    ],
)
def test_a_variance_is_never_less_than_nothing(square, mean, change, backend):
    """With alpha = 1 the averages stay what they are."""
    assert weight_after(backend, 0.25, square, mean, 1.0) == pytest.approx(1.0 - change, rel=1e-6)


def test_a_square_that_overflows_moves_nothing(backend):
    assert weight_after(backend, 1e30, 1.0, 0.0, 0.99) == 1.0


@pytest.mark.parametrize(("square", "mean"), [(math.nan, 0.0), (1.0, math.nan)])
def test_a_nan_stays_one(square, mean, backend):
    assert math.isnan(weight_after(backend, 0.25, square, mean, 1.0))


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_out_of_range_is_an_error(alpha):
    with pytest.raises(ValueError, match=rf"alpha={alpha} is out of range; allowed: 0.0 <= alpha"):
        FusedScaledRMSprop([torch.ones(1, requires_grad=True)], alpha=alpha)

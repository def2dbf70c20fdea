"""The scaling rules against closed forms, through the public optimizers in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fused_ema import FusedScaledAdam, FusedScaledAdamW, FusedScaledSGD

KAPPAS = (0.5, 1.0, 2.0, 3.0, 8.0, 24.5, 256.0)
each_kappa = pytest.mark.parametrize("kappa", KAPPAS)
ULP = 2.0**-52


def parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def make(cls, p, **kwargs):
    return cls([p], backend="reference", **kwargs)


def step(opt, p, grad, times: int = 1) -> None:
    for _ in range(times):
        p.grad = torch.as_tensor(grad, dtype=torch.float64).expand_as(p).clone()
        opt.step()


def close(actual, expected, steps: int, scale=1.0) -> None:
    """Equal up to a few roundings per step of numbers as large as `scale`."""
    actual, expected = (np.asarray(x, dtype=np.float64) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=8 * steps * ULP * scale)


def evolved(rho: float, eta: float, kappa: float, steps: int, order: str) -> np.ndarray:
    """Rows theta and zeta of the map of (theta, zeta, g) under SGD with a constant gradient."""
    p = parameter(1.0, 0.0, 0.0)
    opt = make(FusedScaledSGD, p, lr=eta, ema_decay=rho, ema_order=order, kappa=kappa)
    step(opt, p, 0.0)
    with torch.no_grad():
        opt.state[p]["ema"].copy_(torch.tensor([0.0, 1.0, 0.0]))
    step(opt, p, torch.tensor([0.0, 0.0, 1.0]), steps)
    return torch.stack([p.detach(), opt.state[p]["ema"]]).numpy()


def drift(rho: float, eta: float, kappa: int) -> float:
    """delta of the paper: what one scaled step misses of kappa small ones."""
    return -eta * (kappa - (1 - rho**kappa) / (1 - rho))


@pytest.mark.parametrize("kappa", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(("rho", "eta"), [(0.5, 0.25), (0.9, 0.1), (0.99, 3.0)])
def test_small_steps_are_the_power_of_the_matrix(rho, eta, kappa):
    """[[1,0,-eta],[1-rho,rho,0],[0,0,1]]^kappa has -kappa eta, rho^kappa, 1-rho^kappa, delta."""
    small = evolved(rho, eta, 1.0, kappa, "before")
    power = np.linalg.matrix_power(
        np.array([[1, 0, -eta], [1 - rho, rho, 0], [0, 0, 1]]), kappa
    )  # fmt: skip
    entries = [
        [1, 0, -kappa * eta],
        [1 - rho**kappa, rho**kappa, drift(rho, eta, kappa)],
    ]
    close(small, entries, kappa, kappa * eta + 1)
    close(power[:2], entries, kappa, kappa * eta + 1)


@pytest.mark.parametrize("kappa", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(("rho", "eta"), [(0.5, 0.25), (0.9, 0.1), (0.99, 3.0)])
def test_one_scaled_step_misses_only_the_drift(rho, eta, kappa):
    scaled = evolved(rho, eta, float(kappa), 1, "before")
    close(scaled, [[1, 0, -kappa * eta], [1 - rho**kappa, rho**kappa, 0]], 1, kappa * eta + 1)
    missed = evolved(rho, eta, 1.0, kappa, "before") - scaled
    close(missed, [[0, 0, 0], [0, 0, drift(rho, eta, kappa)]], kappa, kappa * eta + 1)


@each_kappa
def test_default_order_follows_the_new_weights(kappa):
    rho, eta = 0.9, 0.1
    weight = -math.expm1(kappa * math.log(rho))
    expected = [[1, 0, -kappa * eta], [weight, 1 - weight, -kappa * eta * weight]]
    close(evolved(rho, eta, kappa, 1, "after"), expected, 1, kappa * eta + 1)


def test_a_fraction_of_a_step_composes():
    """Two steps at kappa = 1/2 are one at kappa = 1, up to the drift."""
    halves, whole = evolved(0.9, 0.1, 0.5, 2, "before"), evolved(0.9, 0.1, 1.0, 1, "before")
    close(halves[:, :2], whole[:, :2], 2)
    close(halves[0], whole[0], 2)
    close(halves[1, 2], -0.05 * (1 - math.sqrt(0.9)), 2)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 0.9999, 1 - 1e-9, 1.0])
@each_kappa
def test_ema_weight_keeps_its_digits(rho, kappa):
    """1 - rho^kappa to full relative precision, also in float32 and for rho next to 1."""
    expected = -math.expm1(kappa * math.log(rho)) if rho else 1.0
    for dtype, tolerance in ((torch.float64, 8 * ULP), (torch.float32, 2.0**-22)):
        p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        opt = make(FusedScaledSGD, p, lr=0.0, ema_decay=rho, kappa=kappa)
        opt.step()
        opt.state[p]["ema"].zero_()
        opt.step()
        found = opt.state[p]["ema"].double().numpy()
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("path", [(1.0,) * 12, (4.0, 8.0), (0.5, 3.5, 7.0, 1.0)])
def test_decay_of_the_average_depends_on_samples_alone(path):
    p = parameter(1.0)
    opt = make(FusedScaledSGD, p, lr=0.0, ema_decay=(0.9, 0.999))
    opt.step()
    for key in ("ema", "ema_1"):
        opt.state[p][key].zero_()
    for kappa in path:
        opt.kappa = kappa
        opt.step()
    for key, rho in (("ema", 0.9), ("ema_1", 0.999)):
        close(opt.state[p][key], 1 - rho ** sum(path), len(path))


@each_kappa
def test_schedule_is_read_at_base_steps(kappa):
    """A scheduled rho is a function of samples seen, read in the middle of each step's."""
    seen = []

    def schedule(t):
        seen.append(t)
        return 0.9

    p = parameter(1.0)
    opt = make(FusedScaledSGD, p, lr=0.1, ema_decay=schedule, kappa=kappa)
    step(opt, p, 1.0, 4)
    assert sorted(set(seen)) == [max(kappa * i + (kappa - 1) / 2, 0) for i in range(4)]


@each_kappa
def test_adam_with_a_constant_gradient(kappa):
    """Corrected moments are g and g^2 whatever the betas: -sqrt(kappa) eta g / (|g| + eps')."""
    lr, eps, g = 0.01, 0.3, torch.tensor([0.5, -2.0, 0.01], dtype=torch.float64)
    p = parameter(0.0, 0.0, 0.0)
    opt = make(FusedScaledAdam, p, lr=lr, eps=eps, kappa=kappa)
    root = math.sqrt(kappa)
    update = root * lr * g / (g.abs() + eps / root)
    for count in range(1, 30):
        step(opt, p, g)
        # the corrections 1 - beta^t are sums over t that start at a thousandth
        np.testing.assert_allclose(p.detach(), -count * update, rtol=1e-12)


def test_adam_with_a_constant_gradient_and_changing_kappa():
    """The correction divides by one minus the product of the betas used so far."""
    lr, eps, g = 0.01, 0.3, 0.7
    p, expected = parameter(0.0), 0.0
    opt = make(FusedScaledAdam, p, lr=lr, eps=eps)
    for kappa in (1.0, 1.0, 8.0, 0.5, 3.0, 3.0, 0.25):
        opt.kappa = kappa
        step(opt, p, g)
        expected -= math.sqrt(kappa) * lr * g / (g + eps / math.sqrt(kappa))
        np.testing.assert_allclose(p.item(), expected, rtol=1e-12)


@each_kappa
def test_betas_of_zero_stay_zero(kappa):
    """Without memory Adam divides each gradient by its own size."""
    p, expected = parameter(0.0), 0.0
    opt = make(FusedScaledAdam, p, lr=0.1, betas=(0.0, 0.0), eps=0.2, kappa=kappa)
    root = math.sqrt(kappa)
    for g in (1.0, -0.25, 3.0, 0.125):
        step(opt, p, g)
        expected -= root * 0.1 * g / (abs(g) + 0.2 / root)
        close(p.item(), expected, 4, root)


@each_kappa
def test_large_eps_turns_adam_into_sgd(kappa):
    """eps/sqrt(kappa) and sqrt(kappa) eta together give SGD's kappa eta."""
    huge = 1e12
    p = parameter(0.0)
    opt = make(FusedScaledAdam, p, lr=0.1 * huge, betas=(0.0, 0.5), eps=huge, kappa=kappa)
    step(opt, p, 2.0)
    np.testing.assert_allclose(p.item(), -kappa * 0.1 * 2.0, rtol=1e-10)


@each_kappa
def test_moments_forget_by_samples(kappa):
    """beta^kappa per step: after the same samples the moments have the same memory."""
    p = parameter(0.0)
    opt = make(FusedScaledAdam, p, betas=(0.9, 0.99), kappa=kappa)
    step(opt, p, 1.0)
    first, second = (opt.state[p][key].item() for key in ("exp_avg", "exp_avg_sq"))
    step(opt, p, 0.0, 3)
    close(opt.state[p]["exp_avg"].item(), first * 0.9 ** (3 * kappa), 3)
    close(opt.state[p]["exp_avg_sq"].item(), second * 0.99 ** (3 * kappa), 3)


@pytest.mark.parametrize("kappa", [0.5, 1.0, 3.0, 8.0, 10.0])
def test_linear_beta_scaling(kappa):
    p = parameter(0.0)
    opt = make(FusedScaledAdam, p, betas=(0.9, 0.99), beta_scaling="linear", kappa=kappa)
    step(opt, p, 1.0)
    close(opt.state[p]["exp_avg"].item(), min(kappa * 0.1, 1.0), 1)
    close(opt.state[p]["exp_avg_sq"].item(), kappa * 0.01, 1)


@pytest.mark.parametrize("kappa", [1.0, 3.0, 8.0])
def test_linear_beta_scaling_corrects_its_own_bias(kappa):
    p = parameter(0.0)
    opt = make(
        FusedScaledAdam, p, lr=0.1, betas=(0.9, 0.99), eps=0.2, beta_scaling="linear", kappa=kappa
    )
    step(opt, p, 0.5, 20)
    root = math.sqrt(kappa)
    np.testing.assert_allclose(p.item(), -20 * root * 0.1 * 0.5 / (0.5 + 0.2 / root), rtol=1e-12)


@pytest.mark.parametrize("cls", [FusedScaledAdam, FusedScaledAdamW])
def test_linear_beta_scaling_out_of_range(cls):
    """The error names the rule, and nothing moves."""
    p = parameter(1.0)
    with pytest.raises(ValueError, match="linear"):
        step(make(cls, p, beta_scaling="linear", kappa=16.0), p, 1.0)
    assert p.item() == 1.0


def test_linear_beta_scaling_out_of_range_after_a_change():
    p = parameter(1.0)
    opt = make(FusedScaledAdam, p, beta_scaling="linear", ema_decay=0.9)
    step(opt, p, 1.0)
    before = p.item(), opt.state[p]["exp_avg"].item(), opt.state[p]["ema"].item()

    def change_and_step():
        opt.kappa = 16.0
        step(opt, p, 1.0)

    with pytest.raises(ValueError, match="linear"):
        change_and_step()
    assert before == (p.item(), opt.state[p]["exp_avg"].item(), opt.state[p]["ema"].item())


def test_linear_beta_scaling_out_of_range_in_a_group():
    p = parameter(1.0)
    opt = make(FusedScaledAdam, p, beta_scaling="linear")
    opt.param_groups[0]["kappa"] = 16.0
    with pytest.raises(ValueError, match="linear"):
        step(opt, p, 1.0)
    assert p.item() == 1.0


@pytest.mark.parametrize("path", [(1.0,) * 12, (4.0, 8.0), (0.5, 3.5, 7.0, 1.0)])
def test_decoupled_decay_depends_on_samples_alone(path):
    """Without gradient signal the weights shrink by (1 - eta lambda)^kappa."""
    p = parameter(1.0, -3.0)
    opt = make(FusedScaledAdamW, p, lr=0.1, weight_decay=0.3)
    for kappa in path:
        opt.kappa = kappa
        step(opt, p, 0.0)
    close(p.detach(), np.array([1.0, -3.0]) * 0.97 ** sum(path), len(path), 3.0)


@each_kappa
def test_decoupled_decay_left_unscaled(kappa):
    """weight_decay_scaling="none": torch's 1 - lr * weight_decay with the scaled rate."""
    p = parameter(1.0)
    opt = make(FusedScaledAdamW, p, lr=0.1, weight_decay=0.3, weight_decay_scaling="none",
               kappa=kappa)  # fmt: skip
    step(opt, p, 0.0, 3)
    close(p.item(), (1 - math.sqrt(kappa) * 0.03) ** 3, 3)


@each_kappa
def test_l2_decay_is_not_scaled(kappa):
    """SGD multiplies by 1 - kappa eta lambda: L2 is part of the gradient."""
    p = parameter(1.0)
    step(make(FusedScaledSGD, p, lr=0.01, weight_decay=0.2, kappa=kappa), p, 0.0)
    close(p.item(), 1 - kappa * 0.002, 1)


@pytest.mark.parametrize("scaling", ["none", "exact"])
@each_kappa
def test_terminal_velocity_of_momentum(scaling, kappa):
    """With a constant gradient a step ends up kappa eta g / (1 - mu) long under both rules."""
    p = parameter(0.0)
    opt = make(FusedScaledSGD, p, lr=0.1, momentum=0.5, momentum_scaling=scaling, kappa=kappa)
    step(opt, p, 1.0, 120)
    before = p.item()
    step(opt, p, 1.0)
    close(p.item() - before, -kappa * 0.1 / 0.5, 1, abs(before))


@each_kappa
def test_exact_momentum_forgets_by_samples(kappa):
    p = parameter(0.0)
    opt = make(FusedScaledSGD, p, lr=0.1, momentum=0.9, momentum_scaling="exact", kappa=kappa)
    step(opt, p, 1.0)
    entered = (1 - 0.9**kappa) / (1 - 0.9)
    close(p.item(), -kappa * 0.1 * entered, 4, kappa)
    step(opt, p, 0.0)
    close(opt.state[p]["momentum_buffer"].item(), entered * 0.9**kappa, 4, entered)


@pytest.mark.parametrize(("order", "missing"), [("after", 0.0), ("before", 1.0)])
@each_kappa
def test_lag_behind_weights_at_constant_velocity(order, missing, kappa):
    """zeta - theta tends to v rho^/(1 - rho^), one step of v more for the weights before."""
    p = parameter(0.0)
    opt = make(FusedScaledSGD, p, lr=0.01, ema_decay=0.5, ema_order=order, kappa=kappa)
    step(opt, p, 1.0, 150)
    rho, velocity = 0.5**kappa, kappa * 0.01
    lag = opt.state[p]["ema"].item() - p.item()
    close(lag, velocity * (rho / (1 - rho) + missing), 8, abs(p.item()) + 1)

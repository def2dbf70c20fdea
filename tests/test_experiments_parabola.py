"""The noisy parabola: closed forms, the real optimizer, and what the experiment finds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from fused_ema.experiments import noisy_parabola
from fused_ema.experiments.distributed import Group
from fused_ema.experiments.folder import Folder
from fused_ema.experiments.noisy_parabola import Config, moments, simulate
from fused_ema.scaling import ema_rate

# What a fixture makes once is made in one worker.
pytestmark = pytest.mark.xdist_group("experiments parabola")

# Noise and steps so large that every term of the moments counts.
NOISY = Config(
    kappas=(1, 4), lr=0.02, rho=0.97, base_steps=120, a=1.5, b=0.8, c=0.6, parabolas=20_000,
    groups=1,
)  # fmt: skip
CHOICES = ("rule", "none", "linear", "best")
SUMMARY = {"kappa", "best_rho_before", "best_rho_after", "variance_ratio"}
SUMMARY |= {f"error_{name}_{order}" for name in CHOICES for order in ("before", "after")}


@pytest.mark.parametrize("order", noisy_parabola.ORDERS)
@pytest.mark.parametrize("kappa", [1, 4])
def test_moments_are_those_of_the_optimizer(kappa, order):
    """All five, within 5 standard errors of the simulation: 6e-7 to be outside by chance."""
    *_, expected = moments(NOISY, kappa, ema_rate(NOISY.rho, kappa), order)
    theta, ema = simulate(NOISY, kappa, order)
    samples = (theta, theta**2, ema, ema**2, theta * ema)
    for name, found, value in zip(expected._fields, samples, expected, strict=True):
        standard_error = found.std().item() / NOISY.parabolas**0.5
        assert abs(found.mean().item() - value) < 5 * standard_error, name


def test_the_simulation_tells_the_orders_and_the_noise_apart():
    """Its standard errors are far below what a wrong formula would change."""
    _, ema = simulate(NOISY, 4, "before")
    weight = ema_rate(NOISY.rho, 4)
    *_, right = moments(NOISY, 4, weight, "before")
    *_, other_order = moments(NOISY, 4, weight, "after")
    *_, other_noise = moments(NOISY, 4, weight, "before", noise_kappa=1.0)
    for wrong, name, samples in ((other_order, "ema", ema), (other_noise, "ema_sq", ema**2)):
        standard_error = samples.std().item() / NOISY.parabolas**0.5
        assert abs(getattr(wrong, name) - getattr(right, name)) > 10 * standard_error


@pytest.mark.parametrize("order", noisy_parabola.ORDERS)
def test_expected_values_have_closed_forms(order):
    """``q**n`` for the weights; for the average the solution of its linear recursion."""
    kappa, steps = 4, NOISY.base_steps // 4
    weight = ema_rate(NOISY.rho, kappa)
    r, q = 1 - weight, 1 - kappa * NOISY.lr * NOISY.a
    growth = q * q + kappa * NOISY.lr**2 * NOISY.b * NOISY.a**2
    floor = kappa * NOISY.lr**2 * NOISY.c / (1 - growth)
    *_, last = moments(NOISY, kappa, weight, order)
    seen = weight * (1.0 if order == "before" else q)
    assert last.theta == pytest.approx(q**steps, rel=1e-12)
    assert last.theta_sq == pytest.approx((1 - floor) * growth**steps + floor, rel=1e-12)
    expected = r**steps + seen * (q**steps - r**steps) / (q - r)
    assert last.ema == pytest.approx(expected, rel=1e-12)


def test_same_trajectory_by_native_and_reference():
    """float64: 30 steps of a few roundings each."""
    small = replace(NOISY, parabolas=16, groups=4)
    for order in noisy_parabola.ORDERS:
        native, reference = (
            simulate(replace(small, backend=backend), 4, order)
            for backend in ("native", "reference")
        )
        torch.testing.assert_close(native, reference, rtol=1e-12, atol=1e-14)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The experiment at a few kappas: its folder, and what it says."""
    out = tmp_path_factory.mktemp("parabola") / "out"
    config = Config(kappas=(1, 2, 256), parabolas=16, groups=2)
    noisy_parabola.run(config, Folder(out, "noisy_parabola", config), Group())
    return out, json.loads((out / "summary.json").read_text()), config


def test_summary_is_as_documented(found):
    out, summary, _ = found
    assert set(summary) == SUMMARY
    assert all(len(values) == 3 for values in summary.values())
    assert summary["kappa"] == [1, 2, 256]
    names = {path.name for path in out.iterdir()}
    results = {"config.json", "metrics.jsonl", "summary.json", "figure.json", "figure.png"}
    assert names == {*results, "metrics.sha256", "run.lock"}


def test_the_rule_holds_where_rho_left_alone_does_not(found):
    _, summary, _ = found
    for order in noisy_parabola.ORDERS:
        zero, first, last = summary[f"error_rule_{order}"]
        assert zero == 0
        # about linear in kappa: kappa - 1 in the limit of small steps
        assert last / first == pytest.approx(255, rel=0.05)
        assert last < 0.01
        assert summary[f"error_none_{order}"][0] == 0
        assert min(summary[f"error_none_{order}"][1:]) > 0.1
    # the noise's variance over kappa keeps the average's
    assert summary["variance_ratio"] == pytest.approx([1, 1, 1], abs=0.03)


def test_the_rule_is_not_the_unique_best_choice(found):
    """In the order of the theory the linear form is closer, in the default order the rule is."""
    _, summary, config = found
    rule = [ema_rate(config.rho, kappa) for kappa in summary["kappa"]]
    best = [1 - rho for rho in summary["best_rho_before"]]
    assert best[0] == pytest.approx(rule[0], rel=1e-4)
    assert best[2] / rule[2] == pytest.approx(1.0225, abs=0.002)
    errors = {
        order: {name: summary[f"error_{name}_{order}"][2] for name in CHOICES}
        for order in noisy_parabola.ORDERS
    }
    before, after = errors["before"], errors["after"]
    assert before["best"] < before["linear"] < before["rule"]
    assert after["best"] < after["rule"] < after["linear"]


def test_deviations_are_standard_normal():
    """Of 400 simulations; an optimizer with another decay is far outside."""
    config = replace(NOISY, parabolas=500, groups=400)
    for order in noisy_parabola.ORDERS:
        for name, values in noisy_parabola.deviations(config, 4, order).items():
            found = noisy_parabola.spread_of(values)
            assert abs(found["mean"]) < 5 / 400**0.5, (order, name)
            assert found["deviation"] == pytest.approx(1, abs=5 / 800**0.5), (order, name)
    wrong = replace(config, rho=0.96)
    *_, expected = moments(wrong, 4, ema_rate(wrong.rho, 4), "after")
    _, ema = simulate(config, 4, "after")
    distance = (ema.mean(1) - expected.ema) / (expected.ema_variance / 500) ** 0.5
    assert abs(distance.mean().item()) > 20 / 400**0.5


def test_goes_on_after_the_kappas_that_are_done(found, tmp_path):
    out, summary, config = found
    first, second, third = (out / "metrics.jsonl").read_text().splitlines()
    with Folder(tmp_path, "noisy_parabola", config) as stopped:
        stopped.begin()
        stopped.log({**json.loads(first), "error_none_after": 7.0})
        stopped.log(json.loads(second))
    with (tmp_path / "metrics.jsonl").open("a") as rows:
        rows.write(third[:50])  # when it was killed
    noisy_parabola.run(config, Folder(tmp_path, "noisy_parabola", config), Group())
    again = json.loads((tmp_path / "summary.json").read_text())
    assert again["error_none_after"] == [7.0, *summary["error_none_after"][1:]]
    assert again["best_rho_before"] == summary["best_rho_before"]
    assert len(Folder(tmp_path, "noisy_parabola", config).rows()) == 3

"""Changes of kappa with linear betas, whose bias corrections cannot follow them: a warning."""

from __future__ import annotations

import io
import re
import warnings

import pytest
import torch
from torch import nn

from fused_ema import FusedScaledAdam

BETAS = (0.9, 0.99)


def make(**options):
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    options = {"betas": BETAS, "eps": 0.0, "lr": 0.1, "beta_scaling": "linear", **options}
    return FusedScaledAdam([p], backend="reference", **options), p


def step(opt, p) -> float:
    """The length of a step with a constant gradient, in units of sqrt(kappa) lr."""
    before = float(p.detach()[0])
    p.grad = torch.ones_like(p)
    opt.step()
    return (before - float(p.detach()[0])) / (0.1 * opt.kappa**0.5)


@pytest.mark.parametrize(("first", "then"), [(1.0, 8.0), (8.0, 1.0), (2.0, 1.0), (0.5, 3.0)])
@pytest.mark.parametrize("count", [1, 3])
def test_the_warning_names_the_error(first, then, count):
    """A right step is one unit long: corrected moments of a constant gradient are the gradient."""
    opt, p = make(kappa=first)
    for _ in range(count):
        assert step(opt, p) == pytest.approx(1.0, rel=1e-12)
    opt.kappa = then
    with pytest.warns(UserWarning, match="beta_scaling='linear'") as caught:
        length = step(opt, p)
    assert length != pytest.approx(1.0, rel=2e-3)
    (named,) = re.findall(r"by ([+-][0-9.]+) %", str(caught[0].message))
    assert float(named) == pytest.approx(100 * (length - 1), abs=0.06)


def test_a_change_across_a_checkpoint_is_seen():
    opt, p = make()
    step(opt, p)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other, q = make()
    other.load_state_dict(torch.load(file, weights_only=True))
    other.kappa = 8.0
    with pytest.warns(UserWarning, match=r"kappa=8\.0 after 1\.0 at base step 1 "):
        step(other, q)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), "x", None])
def test_a_bad_saved_kappa_is_refused(bad):
    opt, p = make()
    step(opt, p)
    saved = opt.state_dict()
    saved["param_groups"][0]["stepped_kappa"] = bad
    with pytest.raises(ValueError, match=r"stepped_kappa is .*; allowed: stepped_kappa >= 0"):
        opt.load_state_dict(saved)


def test_right_steps_do_not_warn():
    """Before the first step, at a constant kappa, late, and with exponential betas."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt, p = make(betas=(0.9, 0.9))
        opt.kappa = 4.0
        for _ in range(20):
            step(opt, p)
        opt.kappa = 2.0
        assert step(opt, p) == pytest.approx(1.0, abs=2e-3)
        opt, p = make(beta_scaling="exponential")
        for kappa in (1.0, 8.0, 1.0):
            opt.kappa = kappa
            assert step(opt, p) == pytest.approx(1.0, rel=1e-12)


def test_the_documented_numbers():
    """The documentation's numbers are those of the default betas."""

    def worst(first: float, then: float, counts) -> float:
        errors = []
        for count in counts:
            opt, p = make(betas=(0.9, 0.999), kappa=first)
            for _ in range(count):
                step(opt, p)
            opt.kappa = then
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                errors.append(step(opt, p) - 1)
        return max(errors, key=abs)

    assert worst(1.0, 8.0, range(1, 11)) == pytest.approx(-0.05, abs=0.004)
    assert worst(8.0, 1.0, (1,)) == pytest.approx(0.34, abs=0.004)
    assert abs(worst(8.0, 1.0, (7,))) < 5e-3
    assert abs(worst(8.0, 1.0, (13,))) < 2e-3
    assert abs(worst(1.0, 8.0, (50, 100))) < 2e-3

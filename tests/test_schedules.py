"""EMA decay schedules against their equations, as floats, as tensors and through the optimizer."""

from __future__ import annotations

import math
import pickle
import re
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import twins
from graphs import Graph
from hypothesis import given, settings

from fused_ema import (
    CosineDecay,
    FusedScaledAdamW,
    FusedScaledSGD,
    InverseGammaDecay,
    PowerDecay,
    WarmUpDecay,
    decay_from_half_life,
)
from fused_ema.ema.decay import decay_at

DOCS = Path(__file__).parents[1] / "docs" / "schedules.md"
SCHEDULES = (
    CosineDecay(0.9, 1000.0),
    WarmUpDecay(0.999),
    InverseGammaDecay(0.9999),
    InverseGammaDecay(0.99, inv_gamma=50.0, power=0.8),
    PowerDecay(0.0),
    PowerDecay(6.94),
)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
EPS = 2.0**-52


@pytest.mark.parametrize(
    ("schedule", "t", "expected"),
    [
        (WarmUpDecay(0.999), 0.0, 0.1),
        (WarmUpDecay(0.999), 8.0, 0.5),
        (WarmUpDecay(0.999), 8989.0, 8990 / 8999),
        (WarmUpDecay(0.999), 8991.0, 0.999),
        (WarmUpDecay(0.05), 0.0, 0.05),
        (InverseGammaDecay(1.0), 0.0, 0.0),
        (InverseGammaDecay(1.0), 7.0, 0.75),
        (InverseGammaDecay(1.0, inv_gamma=10.0, power=2.0), 30.0, 15 / 16),
        (InverseGammaDecay(0.7), 7.0, 0.7),
        (PowerDecay(0.0), 0.0, 0.0),
        (PowerDecay(0.0), 3.0, 0.75),
        (PowerDecay(2.0), 1.0, 0.125),
    ],
    ids=repr,
)
def test_values(schedule, t, expected):
    assert schedule(t) == pytest.approx(expected, rel=8 * EPS, abs=0)


def test_the_documented_times_of_inverse_gamma():
    assert InverseGammaDecay(1.0)(31.6e3) == pytest.approx(0.999, abs=1e-6)
    assert InverseGammaDecay(1.0)(1e6) == pytest.approx(0.9999, abs=1e-7)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    schedule=st.sampled_from(SCHEDULES),
    t=st.floats(0.0, 1e9, allow_subnormal=False),
    later=st.floats(0.0, 1e9, allow_subnormal=False),
    kappa=st.sampled_from([0.5, 1.0, 3.0, 256.0]),
)
def test_a_tensor_gives_what_a_float_gives(schedule, t, later, kappa):
    value = schedule(t)
    assert isinstance(value, float)
    assert 0.0 <= value <= schedule(t + later) + 8 * EPS
    assert schedule(t + later) <= 1.0
    clock = torch.tensor(t, dtype=torch.float64)
    found = [(schedule(clock), value)]
    if hasattr(schedule, "geometric_mean"):
        mean = schedule.geometric_mean(t, kappa)
        for k in (kappa, torch.tensor(kappa, dtype=torch.float64)):
            found.append((schedule.geometric_mean(clock, k), mean))
    for tensor, number in found:
        assert tensor.dtype == torch.float64
        assert tensor.shape == ()
        assert float(tensor) == pytest.approx(number, rel=32 * EPS, abs=4 * EPS)


@each_schedule
def test_schedules_are_values(schedule):
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    assert sum(schedule == other for other in SCHEDULES) == 1
    with pytest.raises(AttributeError):
        schedule.limit = schedule.gamma = 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmUpDecay(1.1), r"limit=1\.1 is out of range; allowed: 0\.0 <= limit <= 1\.0"),
        (lambda: WarmUpDecay("0.9"), "limit='0.9' is not a number"),
        (lambda: InverseGammaDecay(-0.1), r"limit=-0\.1 is out of range"),
        (lambda: InverseGammaDecay(0.9, inv_gamma=0.0), r"inv_gamma=0\.0 .* 0\.0 < inv_gamma <"),
        (lambda: InverseGammaDecay(0.9, power=math.inf), "power=inf is out of range"),
        (lambda: PowerDecay(-0.5), r"gamma=-0\.5 is out of range; allowed: 0\.0 <= gamma < inf"),
        (lambda: PowerDecay(math.nan), "gamma=nan is out of range"),
        (lambda: PowerDecay.from_sigma_rel(0.0), r"sigma_rel=0\.0 is out of range"),
        (lambda: PowerDecay.from_sigma_rel(0.29), r"sigma_rel=0\.29 .* sigma_rel <= 0\.2886"),
        (lambda: decay_from_half_life(0, 256), "half_life_samples=0 is out of range"),
        (lambda: decay_from_half_life(math.inf, 256), "half_life_samples=inf is out of range"),
        (lambda: decay_from_half_life(1e6, -1), "base_batch_size=-1 is out of range"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_papers_widths(sigma_rel, gamma):
    assert PowerDecay.from_sigma_rel(sigma_rel).gamma == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("sigma_rel", [1e-4, 0.01, 0.05, 0.1, 0.2, 0.28, 12**-0.5])
def test_sigma_rel_is_the_deviation_of_the_profile(sigma_rel):
    schedule = PowerDecay.from_sigma_rel(sigma_rel)
    assert schedule.sigma_rel == pytest.approx(sigma_rel, rel=1e-12)
    u = sigma_rel**-2  # Equation 126 by a general solver
    root = np.roots([1, 7, 16 - u, 12 - u]).real.max()
    assert schedule.gamma == pytest.approx(root, rel=1e-10, abs=1e-10)
    if sigma_rel >= 0.05:
        nodes, weights = np.polynomial.legendre.leggauss(200)
        tau = (nodes + 1) / 2
        profile = tau**schedule.gamma * weights
        mean = (profile * tau).sum() / profile.sum()
        variance = (profile * (tau - mean) ** 2).sum() / profile.sum()
        assert math.sqrt(variance) == pytest.approx(sigma_rel, rel=1e-6)


def averaged(path, kappas, ema_decay, backend: str = "reference") -> float:
    """The average of weights that take the values of ``path``, one a step."""
    p = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    opt = FusedScaledSGD([p], lr=0.0, ema_decay=ema_decay, backend=backend)
    for value, kappa in zip(path, kappas, strict=True):
        with torch.no_grad():
            p.fill_(value)
        opt.kappa = kappa
        opt.step()
    return float(opt.state[p]["ema"])


def user(t):
    """A schedule that is a line, whose mean over base steps is its value in the middle."""
    return 0.5 + t / 256


@pytest.mark.parametrize("schedule", [user, SCHEDULES[0]], ids=["user", "own"])
def test_the_optimizer_reads_a_schedule_in_the_middle_of_a_step(schedule, backend):
    path, kappas = [3.0, -1.0, 0.5, 2.0], [2.0, 0.5, 8.0, 1.0]
    expected, t = path[0], 0.0
    for value, kappa in zip(path, kappas, strict=True):
        rho = schedule(t + (kappa - 1) / 2) ** kappa
        expected, t = rho * expected + (1 - rho) * value, t + kappa
    assert averaged(path, kappas, schedule, backend) == pytest.approx(expected, rel=1e-13)


def test_less_than_a_base_step_is_not_read_before_the_start():
    seen = []
    averaged([1.0, 1.0, 1.0], [0.5, 0.5, 1.0], lambda t: seen.append(t) or 0.9)
    assert sorted(set(seen)) == [0.0, 0.25, 1.0]


def rising(t):
    return 1 - 0.02 * math.exp(-t / 100)


@pytest.mark.parametrize(
    ("schedule", "rel"),
    [
        (CosineDecay(0.99, 512.0), 1e-3),
        (WarmUpDecay(0.999), 1e-10),
        (WarmUpDecay(0.93), 1e-10),
        (WarmUpDecay(1.0), 1e-10),
        (InverseGammaDecay(0.9999), 2e-2),
        (InverseGammaDecay(0.99, inv_gamma=50.0, power=0.8), 2e-2),
        (rising, 1e-2),
    ],
    ids=lambda value: value.__name__ if value is rising else repr(value),
)
def test_scaled_steps_keep_what_the_small_steps_keep(schedule, rel, backend):
    """Through changes of kappa a weight from before counts as much as after the base steps."""
    kappas = [32.0, 32.0, 1.0, 3.0, 16.0, 2.0, 8.0, 2.0]
    path = [1.0] + [0.0] * (len(kappas) - 1)
    small = np.prod([schedule(32.0 + t) for t in range(round(sum(kappas[1:])))])
    assert averaged(path, kappas, schedule, backend) == pytest.approx(small, rel=rel, abs=0)


def test_the_average_at_the_end_of_a_cosine():
    """The start of the training has the same share in the average at kappa = 32 and kappa = 1."""
    schedule = CosineDecay(0.99, 1024.0)
    small = averaged([1.0] + [0.0] * 992, [32.0] + [1.0] * 992, schedule)
    assert averaged([1.0] + [0.0] * 31, [32.0] * 32, schedule) == pytest.approx(small, rel=1e-4)


@pytest.mark.parametrize("kappa", [2.0, 3.0, 8.0, 32.0])
def test_the_first_step_forgets_the_start_as_the_small_steps_do(kappa):
    for schedule in (WarmUpDecay(0.999), WarmUpDecay(0.5), InverseGammaDecay(0.9999)):
        product = np.prod([schedule(float(t)) for t in range(round(kappa))])
        assert schedule.geometric_mean(0.0, kappa) ** kappa == pytest.approx(product, rel=1e-12)


@each_schedule
@pytest.mark.parametrize("t", [0.0, 1.0, 7.5, 79.0, 123.0, 8990.0, 1e5])
def test_a_base_step_reads_the_schedule_itself(schedule, t):
    """Bit for bit, with a float and on a device."""
    clock, one = (torch.tensor(x, dtype=torch.float64) for x in (t, 1.0))
    assert decay_at(schedule, t, 1.0) == schedule(t)
    for kappa in (1.0, one):
        assert torch.equal(decay_at(schedule, clock, kappa), schedule(clock))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 6.94, 16.97])
@pytest.mark.parametrize("kappas", [[1.0], [8.0], [0.5], [1.0, 3.0, 0.25, 24.5]], ids=repr)
def test_power_decay_weighs_by_the_power_of_the_samples_seen(gamma, kappas, backend):
    """A step from t to t + kappa counts (t + kappa)^(gamma+1) - t^(gamma+1), at every kappa."""
    path = np.random.default_rng(0).normal(size=40)
    kappas = [kappas[len(kappas) * i // 40] for i in range(40)]
    ends = np.cumsum(kappas)
    weights = np.diff((ends / ends[-1]) ** (gamma + 1), prepend=0.0)
    found = averaged(path, kappas, PowerDecay(gamma), backend)
    assert found == pytest.approx(weights @ path, rel=0, abs=1e-13)


def test_a_scaled_power_average_is_the_one_of_the_small_steps():
    path = np.random.default_rng(1).normal(size=60)
    small = averaged(np.repeat(path, 8), [1.0] * 480, PowerDecay(6.94))
    assert averaged(path, [8.0] * 60, PowerDecay(6.94)) == pytest.approx(small, abs=1e-12)


def test_schedules_go_on_in_a_replayed_graph(monkeypatch):
    """On the device, with kappa a tensor that changes, they are what they are on the host."""
    parameters = partial(twins.parameters, ((), (7,), (5, 3)), torch.float64)
    params, others = parameters(), parameters()
    kappa = torch.tensor(2.0, dtype=torch.float64)
    options = {"ema_decay": SCHEDULES, "lr": 1e-2}
    opt = FusedScaledAdamW(params, kappa=kappa, capturable=True, backend="triton", **options)
    twin = FusedScaledAdamW(others, kappa=2.0, **options)
    graph = Graph(monkeypatch)
    for step in range(7):
        if step == 4:
            opt.kappa = twin.kappa = 5.0
        twins.set_gradients(step, params, others)
        twin.step()
        if step == 2:
            graph.capture(opt)
        if step < 2:
            opt.step()
        else:
            graph.replay()
        twins.assert_same(opt, twin, rtol=1e-12, atol=1e-14)


def test_half_life():
    rho = decay_from_half_life(half_life_samples=1_000_000, base_batch_size=256)
    assert rho == pytest.approx(math.exp(-math.log(2) * 256 / 1_000_000), rel=4 * EPS)
    # a million samples at any batch size halve what was
    for kappa in (1.0, 4.0):
        path = [1.0] + [0.0] * round(1_000_000 / (256 * kappa))
        assert averaged(path, [kappa] * len(path), rho) == pytest.approx(0.5, rel=1e-4 * kappa)


def test_the_pages_examples_run(capsys):
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, DOCS.name, "exec"), names)
    assert float(capsys.readouterr().out) < 1e-4

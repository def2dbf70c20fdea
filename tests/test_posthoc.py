"""Post-hoc EMA against quadrature, a general least-squares solver, and averages tracked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fused_ema import FusedScaledSGD, PowerDecay, posthoc

TRACKED = tuple(PowerDecay.from_sigma_rel(sigma) for sigma in (0.05, 0.10))


def stored(count: int, end: float = 1.0) -> tuple[list[float], list[float]]:
    """Times and exponents of both tracked averages at evenly spaced snapshots."""
    times = [end * (i + 1) / count for i in range(count) for _ in TRACKED]
    return times, [schedule.gamma for schedule in TRACKED] * count


def profile(tau: np.ndarray, t: float, gamma: float) -> np.ndarray:
    """How much the average that ends at t takes of the weights at each tau."""
    return np.where(tau <= t, tau**gamma * (gamma + 1) / t ** (gamma + 1), 0.0)


def misfit(weights, times, gammas, t: float, gamma: float) -> float:
    """Root mean square of the fitted profile less the wanted one, by the midpoint rule."""
    tau = (np.arange(40_000) + 0.5) / 40_000 * max(times)
    fitted = sum(w * profile(tau, *one) for w, *one in zip(weights, times, gammas, strict=True))
    return float(np.sqrt(np.mean((fitted - profile(tau, t, gamma)) ** 2)))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((1.0, 6.94), (1.0, 6.94)),
        ((1.0, 16.97), (1.0, 6.94)),
        ((0.4, 16.97), (1.0, 6.94)),
        ((0.4, 6.94), (1.0, 16.97)),
        ((5e6, 1.0), (2e6, 3.0)),
        ((3.0, 0.0), (4.0, 2.5)),
    ],
)
def test_inner_products_are_the_integral(a, b):
    nodes, weights = np.polynomial.legendre.leggauss(200)
    end = min(a[0], b[0])
    tau = (nodes + 1) / 2 * end
    expected = (profile(tau, *a) * profile(tau, *b) * weights).sum() / 2 * end
    for pair in ((a, b), (b, a)):
        given = [torch.tensor(x, dtype=torch.float64) for one in pair for x in one]
        assert float(posthoc.inner_product(*given)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("t", "sigma_rel"), [(1.0, 0.15), (1.0, 0.03), (0.7, 0.075)])
def test_weights_are_the_least_squares_fit(t, sigma_rel):
    times, gammas = stored(8)
    gamma = PowerDecay.from_sigma_rel(sigma_rel).gamma
    found = posthoc.solve_weights(times, gammas, t, gamma)
    tau = (np.arange(200_000) + 0.5) / 200_000
    columns = [profile(tau, *one) for one in zip(times, gammas, strict=True)]
    fit = np.linalg.lstsq(np.stack(columns, axis=1), profile(tau, t, gamma), rcond=None)[0]
    np.testing.assert_allclose(found, fit / fit.sum(), rtol=0, atol=1e-4)
    assert sum(found) == pytest.approx(1.0, abs=1e-12)


def test_the_misfit_falls_with_the_square_of_the_snapshots():
    """The paper: a mean squared error of order n^-4."""
    gamma = PowerDecay.from_sigma_rel(0.15).gamma
    errors = []
    for count in (16, 64):
        times, gammas = stored(count)
        weights = posthoc.solve_weights(times, gammas, 1.0, gamma)
        errors.append(misfit(weights, times, gammas, 1.0, gamma))
    assert 14.0 < errors[0] / errors[1] < 18.0


def test_a_stored_average_is_itself():
    times, gammas = stored(30, end=5e8)
    for index in (0, 17, 59):
        found = posthoc.solve_weights(times, gammas, times[index], gammas[index])
        np.testing.assert_allclose(found, np.eye(60)[index], rtol=0, atol=1e-6)


def test_the_unit_of_time_does_not_matter():
    fits = [
        posthoc.solve_weights(*stored(20, end), 0.9 * end, gamma=4.0) for end in (1.0, 3e3, 1e9)
    ]
    np.testing.assert_allclose(fits, [fits[0]] * 3, rtol=0, atol=1e-9)


def test_a_snapshot_given_twice_shares_its_weight():
    times, gammas = stored(6)
    single = posthoc.solve_weights(times, gammas, 1.0, 4.0)
    double = posthoc.solve_weights([*times, times[-1]], [*gammas, gammas[-1]], 1.0, 4.0)
    np.testing.assert_allclose(double[:-2], single[:-1], rtol=0, atol=1e-9)
    assert double[-1] == pytest.approx(single[-1] / 2, abs=1e-9)


def trained(wanted: PowerDecay, kappas: list[float], every: int):
    """A noisy descent that tracks both averages and the wanted one.

    Returns times, exponents and snapshots of the tracked averages, and the wanted one's last.
    """
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    optimizer = FusedScaledSGD(model.parameters(), lr=0.02, ema_decay=(*TRACKED, wanted))
    times, gammas, snapshots = [], [], []
    for step, kappa in enumerate(kappas, 1):
        optimizer.kappa = kappa
        for p in model.parameters():
            noise = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            p.grad = (p.detach() - 1.0 - 1e-3 * step) + 3.0 * noise
        optimizer.step()
        if step % every == 0:
            for index, schedule in enumerate(TRACKED):
                average = optimizer.ema_state_dict(model, index)
                times.append(optimizer.param_groups[0]["base_steps"])
                gammas.append(schedule.gamma)
                snapshots.append({key: value.clone() for key, value in average.items()})
    return times, gammas, snapshots, optimizer.ema_state_dict(model, len(TRACKED))


def distance(found, expected) -> float:
    return max(float((found[key] - expected[key]).abs().max()) for key in expected)


@pytest.mark.parametrize("sigma_rel", [0.075, 0.13, 0.2])
@pytest.mark.parametrize(
    ("kappas", "closer"),
    [([1.0] * 2000, 300), ([1.0] * 800 + [8.0] * 400, 20)],  # 50 snapshots; 30, uneven
    ids=["1", "1-then-8"],
)
def test_the_reconstruction_is_the_average_tracked_directly(sigma_rel, kappas, closer):
    wanted = PowerDecay.from_sigma_rel(sigma_rel)
    times, gammas, snapshots, expected = trained(wanted, kappas, every=40)
    weights = posthoc.solve_weights(times, gammas, times[-1], wanted.gamma)
    found = posthoc.reconstruct(snapshots, weights)
    nearest = min(distance(snapshot, expected) for snapshot in snapshots)
    assert distance(found, expected) < nearest / closer


def test_sums_are_rounded_once_and_all_else_is_the_lasts():
    x = torch.tensor([1.0, 1e-3, -7.5])
    snapshots = [
        {
            "weight": x * scale,
            "half": (x * scale).to(torch.bfloat16),
            "complex": torch.complex(x * scale, -x),
            "steps": torch.tensor(index),
            "version": index,
        }
        for index, scale in enumerate((1.0, 2.0, 4.0))
    ]
    before = [{**snapshot, "weight": snapshot["weight"].clone()} for snapshot in snapshots]
    weights = [1e8, -1e8, 0.25e8 + 0.25]  # in float32 the sum of the first two would be lost
    found = posthoc.reconstruct((snapshot for snapshot in snapshots), weights)
    assert {key: getattr(value, "dtype", None) for key, value in found.items()} == {
        "weight": torch.float32,
        "half": torch.bfloat16,
        "complex": torch.complex64,
        "steps": torch.int64,
        "version": None,
    }
    assert torch.equal(found["weight"], x)
    assert torch.equal(found["half"], x.to(torch.bfloat16))
    torch.testing.assert_close(found["complex"].real, x, rtol=0, atol=0)
    torch.testing.assert_close(found["complex"].imag, -x * (0.25e8 + 0.25))
    assert found["steps"] == 2
    assert found["version"] == 2
    for snapshot, kept in zip(snapshots, before, strict=True):
        assert torch.equal(snapshot["weight"], kept["weight"])
    found["weight"].zero_()
    assert torch.equal(snapshots[-1]["weight"], 4 * x)


def test_one_snapshot_shares_no_sum():
    snapshot = {"weight": torch.ones(2, dtype=torch.float64)}
    posthoc.reconstruct([snapshot], [1.0])["weight"].zero_()
    assert torch.equal(snapshot["weight"], torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": []}, r"gammas has 2 entries, times has 0; allowed: one for each"),
        ({"gammas": [6.94]}, r"gammas has 1 entries, times has 2"),
        ({"times": [0.0, 2.0]}, r"times=0\.0 is out of range; allowed: 0\.0 < times < inf"),
        ({"gammas": [6.94, -0.6]}, r"gammas=-0\.6 is out of range; allowed: 0\.0 <= gammas < inf"),
        ({"t": 2.5}, r"t=2\.5 is out of range; allowed: 0\.0 < t <= 2\.0"),
        ({"t": 0.0}, r"t=0\.0 is out of range"),
        ({"gamma": math.inf}, "gamma=inf is out of range"),
    ],
)
def test_bad_profiles(changes, message):
    given = {"times": [1.0, 2.0], "gammas": [6.94, 6.94], "t": 2.0, "gamma": 3.0, **changes}
    with pytest.raises(ValueError, match=message):
        posthoc.solve_weights(**given)


@pytest.mark.parametrize(
    ("snapshots", "message"),
    [
        ([], "snapshots is empty"),
        ([{"a": torch.ones(2)}], "weights has 2 entries; allowed: one for each snapshot"),
        ([{"a": torch.ones(2)}] * 3, "weights has 2 entries; allowed: one for each snapshot"),
        ([{"a": torch.ones(2)}, {}], r"snapshots\[1\] lacks 'a'"),
        ([{}, {"a": torch.ones(2)}], r"snapshots\[1\] alone has 'a'"),
        (
            [{"a": torch.ones(2)}, {"a": torch.ones(1)}],
            r"snapshots\[1\]\['a'\] is \(1,\) of torch.float32, in the one before \(2,\) of",
        ),
        (
            [{"a": torch.ones(2)}, {"a": torch.ones(2).half()}],
            r"snapshots\[1\]\['a'\] is \(2,\) of torch.float16",
        ),
        ([{"a": torch.ones(2)}, {"a": 1.0}], r"snapshots\[1\]\['a'\] is no tensor"),
    ],
)
def test_snapshots_that_do_not_fit(snapshots, message):
    weights = [0.5, 0.5] if snapshots else []
    with pytest.raises(ValueError, match=message):
        posthoc.reconstruct(snapshots, weights)


INF = math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64])
def test_what_is_the_same_in_all_snapshots_stays_so(dtype):
    generator = torch.Generator().manual_seed(0)
    info = torch.finfo(dtype)
    special = torch.tensor([INF, -INF, 0.0, info.max, info.min, info.tiny, info.tiny / 4])
    value = torch.cat([special.to(dtype), torch.randn(50, generator=generator).to(dtype)])
    for weights in ([1.5, -0.5], [0.1, 0.2, 0.3, 0.4], [2.7, -1.9, 0.2], [0.0, 1.0]):
        found = posthoc.reconstruct([{"x": value.clone()} for _ in weights], weights)["x"]
        assert torch.equal(found, value), weights


def test_infinities_count_by_the_sum_of_their_weights():
    rows = [
        ((INF, 1.0), (0.5, 0.5), INF),
        ((INF, 1.0), (-0.5, 1.5), -INF),
        ((1.0, INF), (1.0, 0.0), 1.0),
        ((-INF, -INF), (-0.5, 1.5), -INF),
        ((INF, -INF), (1.5, -0.5), INF),  # the second takes away minus infinity
        ((INF, -INF), (0.5, 0.5), math.nan),
        ((math.nan, 1.0), (0.5, 0.5), math.nan),
        ((2.0, 2.0), (1.0, 1.0), 4.0),  # weights may add up to anything
    ]
    for values, weights, right in rows:
        found = posthoc.reconstruct([{"x": torch.tensor([v])} for v in values], weights)
        np.testing.assert_equal(found["x"].item(), right)


def test_sums_of_the_largest_numbers_do_not_overflow_on_the_way():
    values = torch.tensor([[1.7e308, -1.7e308], [-1.7e308, -1.7e308]], dtype=torch.float64)
    snapshots = [{"x": value} for value in values]
    found = posthoc.reconstruct(snapshots, [0.1, 0.9])["x"]
    expected = torch.tensor([-0.8 * 1.7e308, -1.7e308], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    assert found[1] == -1.7e308

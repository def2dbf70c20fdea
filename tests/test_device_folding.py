"""Scalars folded by one kernel on the device: the host's, whatever they are folded from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import shim_backend
import torch
from cases import DEVICE_BACKENDS
from graphs import Graph
from optimizers import OF_RULE, each_optimizer
from tolerances import folding_bound
from twins import set_gradients

import fused_ema
from bench.check import OperatorCount
from fused_ema import rules
from fused_ema.ema.decay import (
    CosineDecay,
    InverseGammaDecay,
    PowerDecay,
    WarmUpDecay,
    ema_rates,
)
from fused_ema.ema.formats import step_seed
from fused_ema.step.backends.group_records import KINDS, SCHEDULES

KAPPAS = (1.0, 2.0, 0.5, 24.5)
# Base steps before the step at hand: none, within warm-ups, and behind the end of each.
CLOCKS = (0.0, 3.0, 1e4)
DECAYS = (
    *(0.0, 1.0, 0.9, 0.99999),
    *(CosineDecay(0.5, total=40.0), WarmUpDecay(0.999), WarmUpDecay(1.0)),
    *(InverseGammaDecay(0.9999), InverseGammaDecay(0.99, 3.0, 1.5), PowerDecay(0.0)),
    *(PowerDecay(6.94), lambda t: (1.0 + t) / (10.0 + t)),
)
# As few as a bucket may hold, of one number of states each.
NUMBERS = {"frozen": ({},), **{rule: o.folded for rule, o in OF_RULE.items()}}
DAMPENING = 0.25  # where Nesterov's momentum allows it
MAKERS: dict[str, Callable[..., Any]] = {
    "frozen": fused_ema.FusedScaledSGD,  # parameters that require no grad
    **{rule: o.ours for rule, o in OF_RULE.items()},
}
RULES = rules.RULES


def flags(rule: rules.Rule) -> Iterator[dict[str, Any]]:
    """All values of all flags together, but for those of variants, which fold alike."""
    group = {**dict.fromkeys(rule.flags, False), **NUMBERS[rule.name][0]}
    known = rule.variant(group)
    names = [flag for flag in rule.flags if rule.variant({**group, flag: True}) == known]
    values = [
        get_args(rule.choices[name]) if name in rule.choices else (False, True) for name in names
    ]
    for chosen in itertools.product(*values):
        yield dict(zip(names, chosen, strict=True))


def groups(rule: rules.Rule) -> list[dict[str, Any]]:
    """Every kappa, every flag and all numbers together."""
    found = []
    for numbers, kappa, chosen in itertools.product(NUMBERS[rule.name], KAPPAS, flags(rule)):
        group = {**numbers, **chosen, "kappa": kappa}
        if rule is rules.SGD and not chosen["nesterov"]:
            group["dampening"] = DAMPENING
        if chosen.get("beta_scaling") == "linear":
            group["kappa"], group["betas"] = min(kappa, 8.0), (0.9, 0.999)
        found.append(group)
    return found


def optimizer(rule: str, given: list[dict[str, Any]], backend: str, **options: Any) -> Any:
    """Two parameters a group, the second without a gradient; one step has been taken."""
    for group in given:
        group["params"] = [torch.nn.Parameter(torch.ones(3)) for _ in "ab"]
        for param in group["params"]:
            param.requires_grad_(rule != "frozen")
    opt = MAKERS[rule](given, backend=backend, capturable=True, **options)
    for group in opt.param_groups:
        if rule != "frozen":
            group["params"][0].grad = torch.ones(3)
    opt.step()
    assert set(opt.backends) == {backend}
    return opt


def table(opt: Any, rule: rules.Rule) -> list[list[float]]:
    """What the optimizer's next step folds, a row a slot."""
    (plan,) = opt._stepper.plans
    if hasattr(plan, "_launch"):
        opt.step()
        return plan._folder.table.tolist()
    return shim_backend.folded(opt.step, len(rule.scalars._fields))


def expected(rule: rules.Rule, group: dict[str, Any], step: float, t: float) -> list[float]:
    """A row by the record's own float64 formulas."""
    scalars = rule.fold(rule.scale(group), step)
    return [*map(float, scalars), *ema_rates(group["ema_decay"], t, group["kappa"])]


def powers(group: dict[str, Any], k: int, num_scalars: int) -> float:
    """See :func:`folding_bound`; of number ``k`` of a row."""
    if k >= num_scalars:
        return max(group["kappa"], 1.0)
    if group.get("momentum_scaling") == "exact" and group["momentum"] < 1.0:
        return 1.0 / (1.0 - group["momentum"])
    return 0.0


def check(rule: rules.Rule, opt: Any, plain: list[dict[str, Any]], backend: str) -> None:
    """Check two steps at every clock against groups that hold the same values as plain numbers."""
    for clock in CLOCKS:
        for group in opt.param_groups:
            group["base_steps"] = clock
            for param in group["params"]:
                opt.state[param]["step"].fill_(clock)
        for k in range(2):
            rows = iter(table(opt, rule))
            for group, values in zip(opt.param_groups, plain, strict=True):
                kappa = values["kappa"]
                begin = clock + k * kappa
                assert float(group["base_steps"]) == begin + kappa
                for i, param in enumerate(group["params"]):
                    active = i == 0 and rule.name != "frozen"
                    count = begin + kappa if active else clock
                    assert float(opt.state[param]["step"]) == count
                    row, full = next(rows), {**group, **values}
                    wanted = expected(rule, full, begin + kappa, begin)
                    num_scalars = len(rule.scalars._fields)
                    for j in range(0 if active else num_scalars, len(wanted)):
                        bound = folding_bound(wanted[j], backend, powers(full, j, num_scalars))
                        assert abs(row[j] - wanted[j]) <= bound, (values, begin, j)


@pytest.mark.parametrize("name", RULES)
def test_rows_are_the_hosts(name, device_backend):
    """The rows of all flags, kappas and schedules, which one launch folds, are the host's."""
    rule = RULES[name]
    given = groups(rule)
    plain = [dict(group) for group in given]
    opt = optimizer(name, given, device_backend, ema_decay=DECAYS)
    check(rule, opt, plain, device_backend)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [*KINDS, torch.uint8], ids=str)
def test_numbers_are_read_where_they_lie(name, dtype, device_backend):
    """Tensors of any dtype, some beside floats, are read at each run."""
    rule = RULES[name]
    whole = not dtype.is_floating_point
    values = {"lr": 2, "weight_decay": 3, "kappa": 2} if whole else {"lr": 0.25, "kappa": 1.5}
    if name == "frozen":
        values = {"kappa": values["kappa"]}
    decays = (1, 0.5) if whole else (0.75, 0.5)
    first = {k: torch.tensor(v, dtype=dtype) for k, v in values.items()}
    first["ema_decay"] = (torch.tensor(decays[0], dtype=dtype), decays[1])
    given = [first, dict(values)]
    opt = optimizer(name, given, device_backend, ema_decay=decays)
    for factor in (1, 2):
        plain = [{**opt.param_groups[0], **values, "ema_decay": decays}, values]
        check(rule, opt, plain, device_backend)
        first["kappa"].mul_(2 if factor == 1 else 1)
        values["kappa"] *= 2
        opt.param_groups[1]["kappa"] = values["kappa"]


def test_every_schedule_of_ours_is_known():
    schedules = [c for c in vars(fused_ema).values() if isinstance(c, type) and "Decay" in str(c)]
    assert set(schedules) == set(SCHEDULES)
    for schedule, (_, fields) in SCHEDULES.items():
        assert tuple(schedule.__dataclass_fields__) == fields


@pytest.mark.parametrize("form", ["bf16", "delta"])
def test_seeds_are_the_hosts(form, device_backend):
    given = [{"rounding_seed": seed} for seed in (0, 1, 2**32 - 1)]
    opt = optimizer("sgd", given, device_backend, lr=0.1, ema_decay=0.9, ema_format=form)
    for clock in (0.0, 1.0, 1.5, 2.0**33):
        for group in opt.param_groups:
            group["base_steps"] = clock
        rows = iter(table(opt, rules.SGD))
        for group in opt.param_groups:
            for _ in group["params"]:
                assert next(rows)[-1] == step_seed(group["rounding_seed"], clock)


def test_a_skipped_step_counts_nothing(device_backend):
    opt = optimizer("adam", [{}, {"kappa": 2.0}], device_backend, ema_decay=0.9)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    before = [float(group["base_steps"]) for group in opt.param_groups]
    counts = [float(entry["step"]) for entry in opt.state.values()]
    opt.step()
    assert [float(group["base_steps"]) for group in opt.param_groups] == before
    assert [float(entry["step"]) for entry in opt.state.values()] == counts
    opt.found_inf = torch.tensor(0.0)
    opt.step()
    moved = [float(group["base_steps"]) for group in opt.param_groups]
    assert moved == [before[0] + 1.0, before[1] + 2.0]


def test_the_last_of_several_buckets_counts_base_steps(device_backend):
    """All of them read what they were before the step."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.float64)]
    alone = torch.nn.Parameter(torch.ones(3))
    options = {"ema_decay": WarmUpDecay(0.9), "lr": 0.1}
    opt = fused_ema.FusedScaledSGD(
        [{"params": params}, {"params": [alone], "kappa": 2.0}],
        backend=device_backend,
        capturable=True,
        **options,
    )
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = fused_ema.FusedScaledSGD(twins, backend="reference", **options)
    for _ in range(3):
        for param in (*params, alone, *twins):
            param.grad = torch.ones_like(param)
        opt.step()
        twin.step()
    assert len(opt._stepper.plans) == 2
    assert [float(group["base_steps"]) for group in opt.param_groups] == [3.0, 6.0]
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(opt.state[p]["ema"], twin.state[q]["ema"])


# Launches of a captured step, without the one that takes norms; one of them copies Triton's
# addresses to the device.
MOST_LAUNCHES = 3


@pytest.mark.parametrize("num_groups", [1, 50])
@each_optimizer
def test_launches_of_a_captured_step(optimizer, num_groups, device_backend, monkeypatch):
    decays = [0.99, CosineDecay(0.5, 40.0), WarmUpDecay(0.9), PowerDecay(1.0)]
    given = [
        {
            "params": [torch.nn.Parameter(torch.ones(4)) for _ in "abc"],
            "lr": torch.tensor(0.1),
            "kappa": 1.0 + k,
            "ema_decay": decays[k % len(decays)],
        }
        for k in range(num_groups)
    ]
    opt = optimizer.ours(given, capturable=True, backend=device_backend)
    for _ in range(2):
        for group in opt.param_groups:
            set_gradients(0, group["params"])
        opt.step()
    graph = Graph(monkeypatch)
    graph.capture(opt)
    assert 2 <= len(graph.calls) <= MOST_LAUNCHES + optimizer.ours.rule.takes_norms


@pytest.mark.parametrize("num_groups", [1, 50])
def test_operators_of_an_eager_step(num_groups, device_backend, monkeypatch):
    """Where nothing has changed no torch operator runs beside the kernels."""
    given = [{"params": [torch.nn.Parameter(torch.ones(4))]} for _ in range(num_groups)]
    opt = fused_ema.FusedScaledAdamW(given, capturable=True, backend=device_backend, ema_decay=0.9)
    for group in opt.param_groups:
        set_gradients(0, group["params"])
    opt.step()
    opt.step()
    launches = []
    for launching in (opt._stepper.plans[0], getattr(opt._stepper.plans[0], "_folder", None)):
        if hasattr(launching, "_launch"):  # the interpreter is made of torch's operators, too
            monkeypatch.setattr(launching, "_launch", lambda **parts: launches.append(parts))
    operators = OperatorCount()
    with operators:
        opt.step()
    assert operators.count <= 2  # the profiler's marks of any optimizer
    assert len(launches) == (2 if device_backend == "triton" else 0)


def test_more_groups_than_can_be_passed_by_value(device_backend, monkeypatch):
    """They go by way of a table on the device; a graph has its own."""
    given = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1 / (1 + k)} for k in range(400)
    ]
    others = [torch.nn.Parameter(torch.ones(2)) for _ in given]
    opt = fused_ema.FusedScaledAdamW(given, capturable=True, backend=device_backend, ema_decay=0.9)
    twin = fused_ema.FusedScaledAdamW(
        [{"params": [p], "lr": group["lr"]} for p, group in zip(others, given, strict=True)],
        ema_decay=0.9,
        backend="native",
    )
    params = [group["params"][0] for group in opt.param_groups]
    graph = Graph(monkeypatch)
    for step in range(5):
        set_gradients(0, params, others)
        if step == 2:
            graph.capture(opt)
        if step == 3:
            opt.param_groups[7]["lr"] = twin.param_groups[7]["lr"] = 0.5
        opt.step() if step != 2 else graph.replay()
        twin.step()
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q)
            torch.testing.assert_close(opt.state[p]["ema"], twin.state[q]["ema"])


def test_the_backends_are_those_that_capture():
    assert set(DEVICE_BACKENDS) >= {"triton", "shim"}

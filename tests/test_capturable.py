"""capturable=True: scalars folded on the device, where a captured graph goes on without Python."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import twins
from cases import FEW, by_name
from graphs import Graph
from harness import build, follow, make_problem
from optimizers import each_optimizer
from twins import set_gradients

import fused_ema
from fused_ema.ema.decay import CosineDecay

SHAPES = ((), (0,), (7,), (5, 3))


@pytest.mark.parametrize(
    "name",
    [
        "SGD-dampening-decay-maximize",
        "SGD-groups",
        "SGD-exact-changes",
        "SGD-scaled-groups",
        "SGD-ema-none-gradients",
        "Adam-zero-beta1",
        "Adam-linear",
        "Adam-kappa-changes",
        "AdamW-tensor-lr",
        "AdamW-unscaled-decay",
        "AdamW-scaled-groups",
        "AdamW-ema-none-gradients",
        "AdamW-extreme-decays",
    ],
)
def test_steps_and_trajectory_match_the_oracle(name, device_backend):
    case = by_name(name)
    problem = make_problem(case, FEW, [torch.float32], 20)
    opt = build(case.optimizer.ours, case, problem, backend=device_backend, capturable=True)
    follow(opt, case, problem, 20)
    assert set(opt.backends) == {device_backend}


parameters = partial(twins.parameters, SHAPES, torch.float64)
assert_same = partial(twins.assert_same, rtol=1e-12, atol=1e-14)


REPLAYS = 100


@each_optimizer
def test_a_replayed_graph_goes_on(optimizer, device_backend, monkeypatch):
    """Step counts, schedules and tensor hyper-parameters move while Python stands still."""
    cls, flags = optimizer.ours, optimizer.options
    options = {**flags, "ema_decay": (0.9, CosineDecay(0.5, total=40.0))}
    params, others = parameters(), parameters()
    lr = torch.tensor(1e-2, dtype=torch.float64)
    kappa = torch.tensor(2.0, dtype=torch.float64)
    opt = cls(params, lr, kappa=kappa, capturable=True, backend=device_backend, **options)
    twin = cls(others, 1e-2, kappa=2.0, **options)
    graph = Graph(monkeypatch)
    for step in range(2 + REPLAYS):
        if step % 7 == 5:
            changed = 1e-2 / (1 + step), 1.0 + step % 3
            lr.fill_(changed[0])
            opt.kappa = changed[1]
            twin.param_groups[0]["lr"], twin.kappa = changed
        set_gradients(step, params, others)
        twin.step()
        if step == 2:
            before = [p.clone() for p in params]
            graph.capture(opt)
            assert all(map(torch.equal, before, params))
        if step < 2:
            opt.step()
        else:
            graph.replay()
        assert_same(opt, twin)


@each_optimizer
def test_eager_steps_go_on_after_a_capture(optimizer, device_backend, monkeypatch):
    """What a capture noted down but did not carry out is not taken for done."""
    cls, flags = optimizer.ours, optimizer.options
    options = {**flags, "ema_decay": 0.9}
    params, others = parameters(), parameters()
    opt = cls(params, 1e-2, capturable=True, backend=device_backend, **options)
    twin = cls(others, 1e-2, **options)
    graph = Graph(monkeypatch)
    set_gradients(0, params, others)
    opt.step()
    twin.step()
    for group in (opt.param_groups[0], twin.param_groups[0]):
        group["lr"] = 5e-3
    graph.capture(opt)
    for step, go_on in enumerate((opt.step, graph.replay, opt.step, graph.replay)):
        set_gradients(step, params, others)
        go_on()
        twin.step()
        assert_same(opt, twin)


def test_a_graph_outlives_its_plans(monkeypatch):
    """A new param group makes new plans; the graph's memory stays."""
    params = parameters()
    opt = fused_ema.FusedScaledAdamW(params, capturable=True, backend="triton", ema_decay=0.9)
    graph = Graph(monkeypatch)
    set_gradients(0, params)
    opt.step()
    graph.capture(opt)
    (captured,) = opt._stepper.plans
    opt.add_param_group({"params": parameters(seed=1)})
    opt.step()
    assert captured in opt._stepper._captured
    assert captured not in opt._stepper.plans
    opt.load_state_dict(opt.state_dict())
    assert captured in opt._stepper._captured


@pytest.mark.parametrize("kernels", ["triton", "foreach", "reference"])
def test_a_capture_needs_capturable(kernels, monkeypatch):
    params = parameters()
    opt = fused_ema.FusedScaledAdamW(params, backend=kernels)
    set_gradients(0, params)
    opt.step()
    before = [p.clone() for p in params]
    with pytest.raises(RuntimeError, match="capturable=True"):
        Graph(monkeypatch).capture(opt)
    assert all(map(torch.equal, before, params))


def test_the_first_step_is_not_captured(monkeypatch):
    """State and plans that a capture makes would hold nothing until a replay."""
    params = parameters()
    opt = fused_ema.FusedScaledAdamW(params, backend="triton", capturable=True)
    set_gradients(0, params)
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        Graph(monkeypatch).capture(opt)
    assert not opt.state
    opt.step()
    opt.add_param_group({"params": parameters(seed=1)})
    count = opt.state[params[0]]["step"].clone()
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        Graph(monkeypatch).capture(opt)
    assert torch.equal(opt.state[params[0]]["step"], count)
    opt.param_groups[0]["ema_order"] = "before"
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        Graph(monkeypatch).capture(opt)
    opt.step()  # with new plans
    assert len(opt._stepper.plans) == 2  # of either order


def test_other_backends_say_that_they_cannot():
    opt = fused_ema.FusedScaledSGD(parameters(), capturable=True, backend="native")
    with pytest.raises(RuntimeError, match="native: capturable=True"):
        opt.step()


def test_state_moves_between_capturable_and_not():
    """A count on the device continues on the host, and the other way round."""
    cls, flags = fused_ema.FusedScaledAdamW, {"weight_decay": 0.5}
    chain = [parameters(), parameters(), parameters()]
    straight = parameters()
    twin = cls(straight, ema_decay=0.9, **flags)
    saved = None
    for part, (params, capturable) in enumerate(zip(chain, (False, True, False), strict=True)):
        backend = "triton" if capturable else "native"
        opt = cls(params, ema_decay=0.9, capturable=capturable, backend=backend, **flags)
        if saved is not None:
            opt.load_state_dict(saved)
            for p, q in zip(params, chain[part - 1], strict=True):
                p.data.copy_(q)
        assert opt.param_groups[0]["capturable"] is capturable
        for step in range(3):
            set_gradients(10 * part + step, params, straight)
            opt.step()
            twin.step()
        assert_same(opt, twin)
        saved = opt.state_dict()
        assert isinstance(saved["param_groups"][0]["base_steps"], float)


def test_capturable_may_change_between_steps():
    cls, flags = fused_ema.FusedScaledAdamW, {"weight_decay": 0.5}
    params, others = parameters(), parameters()
    opt = cls(params, ema_decay=0.9, backend="triton", **flags)
    twin = cls(others, ema_decay=0.9, **flags)
    for step, capturable in enumerate((False, True, True, False, True)):
        opt.param_groups[0]["capturable"] = capturable
        set_gradients(step, params, others)
        versions = [p._version for p in params]
        opt.step()
        twin.step()
        assert isinstance(opt.param_groups[0]["base_steps"], torch.Tensor) is capturable
        assert all(p._version > v for p, v in zip(params, versions, strict=True))
        assert_same(opt, twin)


def test_averaged_buffers_follow_a_schedule_on_the_device():
    models = [torch.nn.BatchNorm1d(4) for _ in "ab"]
    options = {"ema_decay": CosineDecay(0.5, total=10.0), "ema_buffers": "average", "kappa": 2.0}
    opt, twin = (
        fused_ema.FusedScaledSGD(model.parameters(), model=model, **options, **device)
        for model, device in zip(
            models, ({"capturable": True, "backend": "triton"}, {}), strict=True
        )
    )
    for step in range(4):
        for model in models:
            torch.manual_seed(step)
            model(torch.randn(8, 4)).square().sum().backward()
        opt.step()
        twin.step()
    held = zip(opt._buffers.averages[0].values(), twin._buffers.averages[0].values(), strict=True)
    for found, expected in held:
        torch.testing.assert_close(found, expected)


def test_one_launch_steps_all_groups(monkeypatch):
    groups = [{"params": parameters(seed=k), "lr": 1e-3 * k} for k in range(5)]
    opt = fused_ema.FusedScaledAdamW(groups, backend="triton", ema_decay=0.9)
    for group in opt.param_groups:
        set_gradients(0, group["params"])
    opt.step()
    (plan,) = opt._stepper.plans
    launches = []
    monkeypatch.setattr(plan, "_launch", lambda **parts: launches.append(parts))
    opt.step()
    assert len(launches) == 1


def test_tensor_hyper_parameters_with_any_params_and_a_loaded_state():
    model = torch.nn.Linear(2, 2)
    lr = torch.tensor(1e-2)
    for params in ([{"params": model.parameters()}], model.named_parameters()):
        opt = fused_ema.FusedScaledAdamW(params, lr, capturable=True, backend="triton")
        model(torch.ones(2)).sum().backward()
        opt.step()
        opt.load_state_dict(opt.state_dict())
        opt.step()
        assert float(opt.state[model.weight]["step"]) == 2.0


@pytest.mark.parametrize("rho", [1.5, float("nan")])
def test_a_schedule_out_of_range_moves_nothing(rho):
    """It is asked before anything moves, in a second bucket as in the first."""
    first, second = parameters(), parameters()
    opt = fused_ema.FusedScaledAdamW(
        [{"params": first}, {"params": second, "ema_order": "before", "ema_decay": lambda t: rho}],
        ema_decay=0.9,
        capturable=True,
        backend="triton",
    )
    set_gradients(0, first, second)
    before = [p.clone() for p in (*first, *second)]
    with pytest.raises(ValueError, match=r"ema_decay=.* is out of range"):
        opt.step()
    assert all(map(torch.equal, before, (*first, *second)))
    assert "step" not in opt.state.get(first[0], {})  # nothing has begun


def test_a_new_group_leaves_a_graphs_counters_in_place(device_backend, monkeypatch):
    """A graph goes on counting where eager steps look."""
    first, second, twins_of_first = parameters(), parameters(seed=1), parameters()
    cls, flags = fused_ema.FusedScaledAdamW, {"weight_decay": 0.5}
    for count in (len(first), 1):
        opt = cls(first[-count:], capturable=True, backend=device_backend, **flags)
        twin = cls(twins_of_first[-count:], **flags)
        graph = Graph(monkeypatch)
        set_gradients(0, first, twins_of_first)
        opt.step()
        twin.step()
        graph.capture(opt)
        opt.add_param_group({"params": second})
        twin.add_param_group({"params": parameters(seed=1)})
        for step, go_on in enumerate((opt.step, graph.replay, opt.step)):
            set_gradients(step, first, twins_of_first, second, twin.param_groups[1]["params"])
            if go_on == graph.replay:
                for p in twin.param_groups[1]["params"]:
                    p.grad = None
            go_on()
            twin.step()
            for p, q in zip(first[-count:], twins_of_first[-count:], strict=True):
                torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
                assert float(opt.state[p]["step"]) == float(twin.state[q]["step"])


def test_a_counter_that_lies_elsewhere_is_seen():
    params, others = parameters(), parameters()
    cls, flags = fused_ema.FusedScaledAdamW, {"weight_decay": 0.5}
    opt = cls(params, capturable=True, backend="triton", **flags)
    twin = cls(others, **flags)
    for step in range(3):
        set_gradients(step, params, others)
        if step == 1:
            for p in params:
                opt.state[p]["step"].data = torch.tensor(7.0, dtype=torch.float64)
            for p in others:
                twin.state[p]["step"].fill_(7.0)
            twin.param_groups[0]["base_steps"] = opt.param_groups[0]["base_steps"] = 0.0
        opt.step()
        twin.step()
        assert_same(opt, twin)


def test_every_group_must_be_capturable(monkeypatch):
    """What the host does for one group, a replay would not do again."""
    first, second = parameters(), parameters()
    groups = [{"params": first}, {"params": second, "capturable": False}]
    opt = fused_ema.FusedScaledAdamW(groups, capturable=True, backend="triton")
    set_gradients(0, first, second)
    opt.step()
    with pytest.raises(RuntimeError, match="capturable=True"):
        Graph(monkeypatch).capture(opt)


def test_flags_may_be_any_truth_value(monkeypatch):
    first, second, others = parameters(), parameters(), [parameters(), parameters()]
    groups = [{"params": first, "maximize": 1}, {"params": second, "maximize": False}]
    twins_of = [{"params": p, "maximize": m} for p, m in zip(others, (True, False), strict=True)]
    opt = fused_ema.FusedScaledAdamW(groups, capturable=True, backend="triton")
    twin = fused_ema.FusedScaledAdamW(twins_of)
    set_gradients(0, first, second, *others)
    opt.step()
    twin.step()
    assert_same(opt, twin)


def test_numbers_on_the_device_are_not_waited_for(monkeypatch):
    """Neither a tensor kappa or decay, nor one that takes the place of an equal float."""
    kappa, decay = torch.tensor([2.0]), torch.tensor(0.9, dtype=torch.float64)
    model, other = (torch.nn.BatchNorm1d(4) for _ in "ab")
    options = {"ema_buffers": "average", "lr": 1e-2}
    opt = fused_ema.FusedScaledSGD(
        *(model.parameters(),),
        **{**options, "model": model, "kappa": kappa, "ema_decay": decay},
        capturable=True,
        backend="triton",
    )
    twin = fused_ema.FusedScaledSGD(
        other.parameters(), model=other, kappa=2.0, ema_decay=0.9, **options
    )
    graph = Graph(monkeypatch)
    for step in range(5):
        for one in (model, other):
            torch.manual_seed(step)
            one(torch.randn(8, 4)).square().sum().backward()
        if step == 1:
            opt.param_groups[0]["lr"] = torch.tensor(1e-2, dtype=torch.float64)
        if step == 2:
            graph.capture(opt)
        if step == 3:
            decay.fill_(0.5)
            twin.param_groups[0]["ema_decay"] = 0.5
        opt.step() if step < 2 else graph.replay()
        twin.step()
        held = (o._buffers.averages[0]["running_mean"] for o in (opt, twin))
        torch.testing.assert_close(*held, rtol=1e-6, atol=0.0)
    assert_same(opt, twin, rtol=1e-5, atol=1e-7)


def test_a_clock_set_by_hand_goes_on_as_a_tensor():
    kappa = torch.tensor(2.0)
    opt = fused_ema.FusedScaledSGD(parameters(), capturable=True, kappa=kappa, backend="triton")
    opt.step()
    opt.param_groups[0]["base_steps"] = 10.0
    opt.step()
    assert float(opt.param_groups[0]["base_steps"]) == 12.0


def test_plans_made_under_inference_mode_can_be_used_outside():
    params, others = parameters(), parameters()
    opt = fused_ema.FusedScaledAdamW(params, capturable=True, backend="triton", ema_decay=0.9)
    twin = fused_ema.FusedScaledAdamW(others, ema_decay=0.9)
    for step in range(3):
        set_gradients(step, params, others)
        with torch.inference_mode(step < 2):
            opt.step()
        twin.step()
        assert_same(opt, twin)

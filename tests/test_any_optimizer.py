"""FusedEMA: averages of what another optimizer steps."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import twins
from graphs import Graph
from torch import nn

from fused_ema import CosineDecay, FusedEMA, FusedScaledSGD
from fused_ema.scaling import ema_rate

parameters = partial(twins.parameters, ((7,), (5, 3), (0,), (33, 2)), torch.float64)


class SignDescent(torch.optim.Optimizer):
    """A third party's."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=0.1),
    "fused Adam": partial(torch.optim.Adam, lr=0.1, fused=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.1),
    "a third party's": SignDescent,
}
SCHEDULE = CosineDecay(0.5, total=20.0)


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_averages_follow(name, order, backend):
    params = parameters()
    opt = OPTIMIZERS[name](params)
    ema = FusedEMA(opt, (0.9, SCHEDULE), kappa=2.0, ema_order=order, backend=backend)
    expected = [[p.detach().clone() for p in params] for _ in "ab"]
    seen = 0.0
    for step in range(6):
        twins.set_gradients(step, params)
        if step == 3:
            params[1].grad = None
            ema.kappa = 0.5
        before = [p.detach().clone() for p in params]
        opt.step()
        decays = (0.9, SCHEDULE(max(seen + (ema.kappa - 1) / 2, 0)))
        seen += ema.kappa
        for averages, rho in zip(expected, decays, strict=True):
            for average, p, old in zip(averages, params, before, strict=True):
                average.lerp_(p.detach() if order == "after" else old, ema_rate(rho, ema.kappa))
    assert ema.backends == (backend,)
    for key, averages in zip(("ema", "ema_1"), expected, strict=True):
        for p, average in zip(params, averages, strict=True):
            torch.testing.assert_close(ema.state[p][key], average, rtol=1e-13, atol=1e-15)


def test_muon():
    params = [p for p in parameters() if p.dim() == 2]
    opt = torch.optim.Muon(params, lr=0.1)
    ema = FusedEMA(opt, 0.5)
    expected = [p.detach().clone() for p in params]
    for step in range(3):
        twins.set_gradients(step, params)
        opt.step()
        for average, p in zip(expected, params, strict=True):
            average.lerp_(p.detach(), 0.5)
    for p, average in zip(params, expected, strict=True):
        torch.testing.assert_close(ema.state[p]["ema"], average, rtol=1e-13, atol=0.0)


def test_its_kappa_leaves_the_optimizer_alone():
    params, others = parameters(), parameters()
    opt, alone = torch.optim.SGD(params, lr=0.1), torch.optim.SGD(others, lr=0.1)
    FusedEMA(opt, 0.9, kappa=8.0)
    for step in range(3):
        twins.set_gradients(step, params, others)
        opt.step()
        alone.step()
    assert all(map(torch.equal, params, others))


def test_one_plan_whatever_has_a_gradient():
    """Gradients that come and go make no plan anew, and frozen parameters are no bucket apart."""
    params = parameters()
    params[0].requires_grad_(False)
    opt = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    ema = FusedEMA(opt, 0.9)
    twins.set_gradients(0, params[1:])
    opt.step()
    (plan,) = ema._stepper.plans
    opt.zero_grad()
    opt.step()
    twins.set_gradients(1, params[1:])
    opt.step()
    assert ema._stepper.plans == [plan]


def test_a_teacher_with_buffers_and_the_rest_of_the_interface():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    teacher = copy.deepcopy(model)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = FusedEMA(opt, 0.5, teacher=teacher, model=model)
    ema.kappa = 16 / 8
    expected = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        model(torch.randn(16, 4)).square().sum().backward()
        opt.step()
        for average, p in zip(expected, model.parameters(), strict=True):
            average.lerp_(p.detach(), 0.75)
    for average, p in zip(expected, teacher.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), average)
    assert torch.equal(teacher[1].running_mean, model[1].running_mean)
    weight = model[0].weight.detach().clone()
    average_of_weight = ema.ema_state_dict(model)["0.weight"].clone()
    with ema.ema_weights():
        assert torch.equal(model[0].weight, average_of_weight)
        with pytest.raises(RuntimeError, match="inside ema_weights"):
            opt.step()
        assert torch.equal(model[0].weight, average_of_weight)
    assert torch.equal(model[0].weight, weight)


def test_groups_are_followed():
    first, second = parameters(), parameters(seed=1)
    opt = torch.optim.SGD(first, lr=0.1)
    ema = FusedEMA(opt, 0.5)
    opt.step()
    opt.add_param_group({"params": second})
    opt.load_state_dict(opt.state_dict())  # puts other dicts into param_groups
    twins.set_gradients(0, first, second)
    before = [p.detach().clone() for p in second]
    opt.step()
    assert len(ema.param_groups) == 2
    for p, old in zip(second, before, strict=True):
        torch.testing.assert_close(ema.state[p]["ema"], (old + p.detach()) / 2)
    opt.param_groups[0]["params"] = parameters()
    with pytest.raises(RuntimeError, match="parameters have been replaced; make a new FusedEMA"):
        opt.step()


def test_a_resumed_run_is_bit_exact():
    params, others = parameters(), parameters()
    opt, other = (torch.optim.SGD(p, lr=0.1, momentum=0.9) for p in (params, others))
    ema, again = FusedEMA(opt, SCHEDULE, kappa=2.0), FusedEMA(other, SCHEDULE, kappa=2.0)
    for step in range(3):
        twins.set_gradients(step, params)
        opt.step()
    saved = copy.deepcopy((opt.state_dict(), ema.state_dict()))
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    for step in range(3, 6):
        twins.set_gradients(step, params, others)
        opt.step()
        other.step()
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(ema.state[p]["ema"], again.state[q]["ema"])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_both_is_a_pair(duplicate):
    params = parameters()
    opt = torch.optim.SGD(params, lr=0.1)
    ema = FusedEMA(opt, 0.5)
    twins.set_gradients(0, params)
    opt.step()
    others, other, again = duplicate((params, opt, ema))
    twins.set_gradients(1, params, others)
    opt.step()
    other.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(ema.state[p]["ema"], again.state[q]["ema"])
        assert not torch.equal(q, again.state[q]["ema"]) or q.numel() == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("order", ["after", "before"])
def test_a_step_that_a_scaler_skips_moves_nothing(order, fused):
    p = nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([p], lr=0.1, fused=fused)
    ema = FusedEMA(opt, 0.5, ema_order=order)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step, value in enumerate((1.0, float("inf"), 1.0)):
        scaler.scale(torch.zeros(()))
        p.grad = torch.full((3,), 2.0 * value)
        before = ema.state[p]["ema"].clone() if step else None
        scaler.step(opt)
        scaler.update(2.0)
        if step == 1:
            assert torch.equal(ema.state[p]["ema"], before)
    assert ema.param_groups[0]["base_steps"] == 2.0


def test_removed_it_follows_no_longer():
    params = parameters()
    opt = torch.optim.SGD(params, lr=0.1)
    ema = FusedEMA(opt, 0.5)
    opt.step()
    ema.remove()
    twins.set_gradients(0, params)
    opt.step()
    assert ema.param_groups[0]["base_steps"] == 1.0


def test_what_it_cannot_follow_is_refused():
    with pytest.raises(TypeError, match=r"received a list; allowed: a torch\.optim\.Optimizer"):
        FusedEMA(parameters(), 0.9)
    with pytest.raises(ValueError, match="FusedScaledSGD has averages of its own"):
        FusedEMA(FusedScaledSGD(parameters()), 0.9)
    opt = torch.optim.SGD(parameters(), lr=0.1)
    for options, message in (
        ({}, "ema_decay=None; allowed"),
        ({"ema_decay": 1.5}, "out of range"),
        ({"ema_decay": 0.5, "kappa": -1.0}, "kappa=-1.0 is out of range"),
        ({"ema_decay": 0.5, "ema_order": "later"}, "ema_order='later' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            FusedEMA(opt, **options)


def test_averages_start_at_the_weights_before_the_first_step():
    """Also those that were loaded after construction, as with the fused optimizers."""
    p = nn.Parameter(torch.zeros(3))
    opt = torch.optim.SGD([p], lr=1.0)
    ema = FusedEMA(opt, 0.5)
    with torch.no_grad():
        p.fill_(9.0)
    p.grad = torch.full((3,), 4.0)
    opt.step()
    assert torch.equal(ema.state[p]["ema"], torch.full((3,), 7.0))  # between 9 and 5


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("kappa", 0.0), ("ema_decay", 1.5), ("ema_decay", lambda t: -1.0), ("ema_order", "later")],
)
def test_a_bad_value_is_refused_before_anything_moves(field, value, order):
    params = parameters()
    opt = torch.optim.SGD(params, lr=0.1)
    ema = FusedEMA(opt, 0.5, ema_order=order)
    twins.set_gradients(0, params)
    opt.step()
    held = copy.deepcopy([*params, *(ema.state[p]["ema"] for p in params)])
    ema.param_groups[0][field] = value
    with pytest.raises(ValueError, match=field):
        opt.step()
    assert all(map(torch.equal, held, [*params, *(ema.state[p]["ema"] for p in params)]))
    assert ema.param_groups[0]["base_steps"] == 1.0


@pytest.mark.parametrize("rows", [5, 20_000])
def test_gradients_that_no_rule_here_could_take_are_nothing_to_it(rows, backend):
    embedding = nn.Embedding(rows, 4, sparse=True)
    opt = torch.optim.SGD(embedding.parameters(), lr=1.0)
    ema = FusedEMA(opt, 0.75, backend=backend)
    expected = embedding.weight.detach().clone()
    for row in (1, 3):
        opt.zero_grad()
        embedding(torch.tensor([row])).sum().backward()
        opt.step()
        expected.lerp_(embedding.weight.detach(), 0.25)
    torch.testing.assert_close(ema.state[embedding.weight]["ema"], expected)


def test_a_step_with_a_closure_and_one_launch_for_all_its_evaluations():
    params = parameters()
    opt = torch.optim.LBFGS(params)
    ema = FusedEMA(opt, 0.5)
    before = copy.deepcopy(params)
    evaluations = []

    def closure():
        opt.zero_grad()
        loss = sum((p**4).sum() for p in params)
        loss.backward()
        evaluations.append(loss)
        return loss

    opt.step(closure)
    assert len(evaluations) > 1
    assert ema.param_groups[0]["base_steps"] == 1.0
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(ema.state[p]["ema"], (old + p).detach() / 2)


def test_two_of_them_and_steps_between():
    p = nn.Parameter(torch.full((3,), 4.0))
    opt = torch.optim.SGD([p], lr=1.0)
    every, second = FusedEMA(opt, 0.5), FusedEMA(opt, 0.5, ema_every=2)
    p.grad = torch.ones(3)
    for expected in ((3.5, 4.0), (2.75, 2.5)):  # the weights become 3, then 2
        opt.step()
        for ema, value in zip((every, second), expected, strict=True):
            assert torch.equal(ema.state[p]["ema"], torch.full((3,), value))


def test_each_group_has_its_own_decay():
    params = parameters()
    opt = torch.optim.SGD([{"params": [p]} for p in params], lr=0.1)
    ema = FusedEMA(opt, 0.5)
    rhos = (0.1, 0.5, 0.7, 0.9)
    for group, rho in zip(ema.param_groups, rhos, strict=True):
        group["ema_decay"] = rho
    before = copy.deepcopy(params)
    twins.set_gradients(0, params)
    opt.step()
    for p, old, rho in zip(params, before, rhos, strict=True):
        expected = (rho * old + (1 - rho) * p).detach()
        torch.testing.assert_close(ema.state[p]["ema"], expected)


def test_groups_are_followed_without_a_step():
    """Saving, loading and reading see a group that the optimizer has just been given."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def made():
        opt = torch.optim.SGD(model[0].parameters(), lr=0.1)
        ema = FusedEMA(opt, 0.5)
        opt.add_param_group({"params": model[1].parameters()})
        return opt, ema

    assert len(made()[1].state_dict()["param_groups"]) == 2
    _, ema = made()
    assert torch.equal(ema.ema_state_dict(model)["1.weight"], model[1].weight)
    assert len(ema.param_groups) == 2
    opt, ema = made()
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    saved = copy.deepcopy(ema.state_dict())
    _, again = made()
    again.load_state_dict(saved)
    for p in model.parameters():
        assert torch.equal(again.state[p]["ema"], ema.state[p]["ema"])


def test_a_copy_of_a_removed_one_is_removed():
    params = parameters()
    opt = torch.optim.SGD(params, lr=0.1)
    ema = FusedEMA(opt, 0.5)
    opt.step()
    ema.remove()
    other, again = copy.deepcopy((opt, ema))
    other.step()
    assert again.param_groups[0]["base_steps"] == 1.0
    opt.param_groups[0]["params"] = parameters()
    assert len(ema.state_dict()["state"]) == len(params)


def test_a_wrapper_without_hooks_is_refused():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer) -> None:
            self.inner = optimizer

        @property
        def param_groups(self):
            return self.inner.param_groups

    opt = torch.optim.SGD(parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"received a Wrapper; allowed: .*step calls hooks"):
        FusedEMA(Wrapper(opt), 0.9)


def test_a_captured_step_goes_on(monkeypatch, device_backend):
    """Replays move weights and averages, the schedule with the samples seen."""
    params, others = parameters(), parameters()
    opt, twin = torch.optim.SGD(params, lr=0.1), torch.optim.SGD(others, lr=0.1)
    ema = FusedEMA(opt, SCHEDULE, kappa=2.0, capturable=True, backend=device_backend)
    expected = FusedEMA(twin, SCHEDULE, kappa=2.0, backend="reference")
    twins.set_gradients(0, params, others)
    opt.step()
    twin.step()
    graph = Graph(monkeypatch)
    graph.capture(SimpleNamespace(_stepper=ema._stepper, step=opt.step))
    for step in range(1, 6):
        twins.set_gradients(step, params, others)
        with torch.no_grad():
            graph.replay()
        twin.step()
    twins.assert_same(ema, expected, rtol=1e-12, atol=1e-14)


def test_a_first_step_in_inference_mode_leaves_plans_that_go_on(device_backend):
    p = nn.Parameter(torch.full((3,), 4.0))
    opt = torch.optim.SGD([p], lr=1.0)
    ema = FusedEMA(opt, 0.5, capturable=True, backend=device_backend)
    p.grad = torch.ones(3)
    with torch.inference_mode():
        opt.step()
    opt.step()
    assert torch.equal(ema.state[p]["ema"], torch.full((3,), 2.75))  # 4, then 3.5 with 3, with 2

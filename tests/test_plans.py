"""Whatever a user replaces between two steps, no plan writes to the old thing."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from planned import STATES, assert_alike, give_gradients, make, parameters, run_with
from torch import nn

from fused_ema import FusedScaledSGD
from fused_ema.optim.stepping import Begun


def test_data_is_replaced(backend):
    def replace(params, _):
        for p in params:
            p.data = p.data.clone()

    before, values = run_with(backend, replace)
    for tensor, value in zip(before, values, strict=True):
        assert torch.equal(tensor, value)


def test_model_changes_dtype(backend):
    def replace(params, _):
        for p in params:
            p.data = p.data.double()
            p.grad = None

    run_with(backend, replace)


@pytest.mark.parametrize("key", STATES)
def test_a_state_tensor_is_replaced(key, backend):
    kept = []

    def replace(params, optimizer):
        for p in params:
            kept.append(optimizer.state[p][key])
            optimizer.state[p][key] = optimizer.state[p][key].clone()

    run_with(backend, replace)
    assert len(kept) == 3


@pytest.mark.parametrize("key", STATES)
def test_a_states_data_is_replaced(key, backend):
    def replace(params, optimizer):
        for p in params:
            optimizer.state[p][key].data = optimizer.state[p][key].data.clone()

    run_with(backend, replace)


def test_a_step_counters_data_is_replaced(backend):
    def replace(params, optimizer):
        for p in params:
            optimizer.state[p]["step"].data = optimizer.state[p]["step"].data.float()

    run_with(backend, replace)


def test_storage_is_replaced_under_the_same_tensor(backend):
    def replace(params, _):
        for p in params:
            p.detach().share_memory_()

    run_with(backend, replace)


def replace_averages(params, optimizer) -> None:
    for p in params:
        optimizer.state[p]["ema"] = optimizer.state[p]["ema"].clone()


def test_the_whole_state_is_replaced(backend):
    def replace(params, optimizer):
        entries = {p: dict(entry) for p, entry in optimizer.state.items()}
        optimizer.state = defaultdict(dict, entries)
        replace_averages(params, optimizer)

    run_with(backend, replace)


def test_a_state_that_is_written_to_and_as_before_keeps_its_plans(backend):
    def replace(params, optimizer):
        plans = optimizer._stepper.plans
        optimizer.state = defaultdict(dict, optimizer.state)
        for p in params:
            optimizer.state[p]["note"] = 1
            del optimizer.state[p]["note"]
        optimizer._prepared(Begun())
        assert optimizer._stepper.plans is plans
        replace_averages(params, optimizer)

    run_with(backend, replace)


def test_parameters_are_swapped_for_new_ones(backend):
    """As Gaussian splatting does when it prunes: a new parameter takes over the state."""

    def replace(params, optimizer):
        group = optimizer.param_groups[0]
        for i, p in enumerate(params):
            group["params"][i] = nn.Parameter(p.detach().clone())
            optimizer.state[group["params"][i]] = optimizer.state.pop(p)

    run_with(backend, replace)


def test_tensors_are_swapped(backend):
    def replace(params, _):
        for p in params:
            torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))

    params, others = parameters(), parameters()
    optimizer, reference = make(params, backend), make(others, "reference")
    give_gradients(params, 1)
    give_gradients(others, 1)
    optimizer.step()
    reference.step()
    for p in params:
        p.grad = None
    replace(params, optimizer)
    give_gradients(params, 2)
    give_gradients(others, 2)
    optimizer.step()
    reference.step()
    assert_alike(params, optimizer, others, reference)


def refill(entry, values) -> None:
    entry.clear()
    entry.update(values)


WRITES = {
    "assign": lambda entry, key, value: entry.__setitem__(key, value),
    "update": lambda entry, key, value: entry.update({key: value}),
    "merge": lambda entry, key, value: entry.__ior__({key: value}),
    "pop and setdefault": lambda entry, key, value: (entry.pop(key), entry.setdefault(key, value)),
    "clear and refill": lambda entry, key, value: refill(entry, {**entry, key: value}),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_way_to_replace_a_state_is_seen(write):
    def replace(params, optimizer):
        for p in params:
            entry = optimizer.state[p]
            WRITES[write](entry, "ema", entry["ema"].clone())

    run_with("native", replace)


def test_load_state_dict_between_steps(backend):
    run_with(backend, lambda _, optimizer: optimizer.load_state_dict(optimizer.state_dict()))


def test_hyper_parameters_that_need_other_states(backend):
    params, others = parameters(), parameters()
    ours = FusedScaledSGD(params, lr=0.1, momentum=0.0, backend=backend)
    theirs = torch.optim.SGD(others, lr=0.1, momentum=0.0, foreach=False)
    for momentum in (0.0, 0.9, 0.9, 0.0):
        for group in (*ours.param_groups, *theirs.param_groups):
            group["momentum"] = momentum
        for p, optimizer in ((params, ours), (others, theirs)):
            give_gradients(p, seed=3)
            optimizer.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_a_group_is_added(backend):
    params, added = parameters(), nn.Parameter(torch.ones(3))
    optimizer = make(params, backend)
    give_gradients(params)
    optimizer.step()
    optimizer.add_param_group({"params": [added], "lr": 1.0, "ema_decay": (0.0, 1.0)})
    give_gradients([*params, added])
    optimizer.step()
    assert torch.equal(optimizer.state[added]["ema"], added)
    assert torch.equal(optimizer.state[added]["ema_1"], torch.ones(3))


def test_without_a_gradient_only_the_average_moves(backend):
    params = parameters()
    optimizer = make(params, backend)
    give_gradients(params)
    optimizer.step()
    params[1].grad = None
    kept = {key: value.clone() for key, value in optimizer.state[params[1]].items()}
    weight = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], weight)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[params[1]][key], kept[key])
    expected = kept["ema"].lerp(weight, 1 - 0.9)
    torch.testing.assert_close(optimizer.state[params[1]]["ema"], expected, rtol=1e-6, atol=1e-6)


def test_frozen_parameters_cost_no_moments_until_they_thaw(backend):
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = make(params, backend)
    give_gradients(params[1:])
    optimizer.step()
    assert set(optimizer.state[params[0]]) == {"step", "ema"}
    params[0].requires_grad_(True)
    give_gradients(params)
    optimizer.step()
    assert set(optimizer.state[params[0]]) == {"step", "ema", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[params[0]]["step"].item() == 1.0


def test_autograd_notices_the_step(backend):
    weight = nn.Parameter(torch.ones(3))
    optimizer = make([weight], backend)
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure_runs_with_gradients_and_its_loss_is_returned(backend):
    weight = nn.Parameter(torch.ones(2))
    optimizer = make([weight], backend)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 2.0
    assert weight.detach().max() < 1.0


def test_lr_scheduler_writes_the_base_lr(backend):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = FusedScaledSGD([weight], lr=1.0, kappa=4.0, backend=backend)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for expected in (-4.0, -6.0, -7.0):
        weight.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        assert weight.item() == expected
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_a_tensor_lr_changed_in_place_is_seen(backend):
    weight, lr = nn.Parameter(torch.zeros(1)), torch.tensor(1.0)
    optimizer = FusedScaledSGD([weight], lr=lr, backend=backend)
    for value in (1.0, 0.5, 0.25):
        lr.fill_(value)
        weight.grad = torch.ones(1)
        optimizer.step()
    assert weight.item() == -1.75


def test_hyper_parameters_in_lists_changed_in_place_are_seen(backend):
    weight = nn.Parameter(torch.ones(1))
    optimizer = FusedScaledSGD([weight], lr=1.0, ema_decay=[1.0], backend=backend)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert optimizer.state[weight]["ema"].item() == 1.0
    optimizer.param_groups[0]["ema_decay"][0] = 0.0
    optimizer.step()
    assert optimizer.state[weight]["ema"].item() == weight.item()


def test_a_closure_cannot_leave_the_average_in_the_weights():
    weight = nn.Parameter(torch.ones(1))
    optimizer = make([weight], "native")
    context = optimizer.ema_weights()
    weight.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"inside ema_weights\(\)"):
        optimizer.step(context.__enter__)
    context.__exit__(None, None, None)
    assert weight.item() == 1.0

"""An average that still is the weights it began with says so when it is read, once."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import fused_ema
from fused_ema import (
    CosineDecay,
    FusedEMA,
    FusedScaledSGD,
    WarmUpDecay,
    YoungAverageWarning,
    ema_state_dict,
    load_ema,
)


@pytest.fixture(autouse=True)
def as_errors():
    """Every young average that is read raises; the suite's own setting ignores it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", YoungAverageWarning)
        yield


def stepped(steps: int, ema_decay: object = 0.99, **options: object):
    model = nn.Linear(2, 1)
    opt = FusedScaledSGD(model.parameters(), lr=0.1, ema_decay=ema_decay, **options)
    step(model, opt, steps)
    return model, opt


def step(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        model(torch.ones(4, 2)).square().mean().backward()
        opt.step()


def read(opt, model, index: int = 0) -> None:
    with opt.ema_weights(index):
        pass


READS = {
    "ema_weights()": read,
    "ema_state_dict()": lambda opt, model: opt.ema_state_dict(model),
    "copy_ema_to()": lambda opt, model: opt.copy_ema_to(nn.Linear(2, 1)),
    "ema_state_dict() of several": lambda opt, model: ema_state_dict(model, [opt]),
    "the decorator": lambda opt, model: opt.ema_weights()(int)(),
}


@pytest.mark.parametrize("how", READS)
def test_every_read_warns_in_the_name_of_the_users_line(how):
    model, opt = stepped(99)
    with pytest.warns(YoungAverageWarning) as caught:
        READS[how](opt, model)
    assert [warning.filename for warning in caught] == [__file__]
    READS[how](opt, model)  # once


def test_the_warning_has_the_number_and_the_cure():
    model, opt = stepped(50, 0.99)
    message = (
        r"ema_weights\(\): the average with ema_decay=0.99 is young: after 50 base steps 61 % of "
        r"it .* about 100, .*WarmUpDecay\(0.99\)"
    )
    with pytest.warns(YoungAverageWarning, match=message):
        read(opt, model)


def test_as_an_error_it_leaves_the_weights_alone():
    model, opt = stepped(5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(YoungAverageWarning), opt.ema_weights():
        pytest.fail("the context opened")
    torch.testing.assert_close(model.state_dict(), before, rtol=0.0, atol=0.0)
    read(opt, model)


@pytest.mark.parametrize(
    ("steps", "ema_decay", "options"),
    [
        (0, 0.99, {}),  # it is the weights
        (100, 0.99, {}),
        (10, 0.9, {}),
        (25, 0.99, {"kappa": 4}),
        (5, WarmUpDecay(0.9999), {}),
        (5, CosineDecay(0.996, 1000), {}),
        (5, 1.0, {}),
        (5, 0.0, {}),
    ],
)
def test_what_is_not_young(steps, ema_decay, options):
    model, opt = stepped(steps, ema_decay, **options)
    for one in READS.values():
        one(opt, model)


def test_base_steps_count_and_not_steps():
    for kappa_scales, steps in (("all", 24), ("ema", 24), ("optimizer", 99)):
        model, opt = stepped(steps, kappa=4, kappa_scales=kappa_scales)
        with pytest.warns(YoungAverageWarning, match=f"{4 * steps if steps == 24 else 99} base"):
            read(opt, model)
        model, opt = stepped(steps + 1, kappa=4, kappa_scales=kappa_scales)
        read(opt, model)


def test_the_average_that_is_read_counts():
    model, opt = stepped(50, (0.9, 0.99))
    read(opt, model, 0)
    with pytest.warns(YoungAverageWarning, match="ema_decay=0.99 "):
        read(opt, model, 1)


def test_the_youngest_group_counts():
    first, second, third = (nn.Linear(1, 1) for _ in range(3))
    groups = [
        {"params": first.parameters(), "ema_decay": 0.9},
        {"params": second.parameters(), "ema_decay": 0.999},
        {"params": third.parameters(), "ema_decay": None},
    ]
    opt = FusedScaledSGD(groups, lr=0.1)
    for _ in range(20):
        opt.step()
    with pytest.warns(YoungAverageWarning, match="ema_decay=0.999 "):
        read(opt, first)


def test_a_teacher_begins_at_values_of_the_users():
    model = nn.Linear(2, 1)
    teacher = copy.deepcopy(model).requires_grad_(False)
    opt = FusedScaledSGD(model.parameters(), lr=0.1, ema_decay=(0.99, 0.9), teacher=teacher)
    step(model, opt, 5)
    read(opt, model)
    with pytest.warns(YoungAverageWarning, match="ema_decay=0.9 "):
        read(opt, model, 1)  # the teacher is the first average alone


def test_an_average_loaded_without_a_count_did_not_begin_here():
    model, opt = stepped(5)
    load_ema(opt, model, nn.Linear(2, 1).state_dict())
    read(opt, model)


def test_the_age_is_resumed():
    model, opt = stepped(100)
    resumed = FusedScaledSGD(model.parameters(), lr=0.1, ema_decay=0.99)
    resumed.load_state_dict(opt.state_dict())
    read(resumed, model)


def test_averages_of_any_optimizer_warn_too():
    model = nn.Linear(2, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = FusedEMA(opt, ema_decay=0.99)
    step(model, opt, 5)
    with pytest.warns(YoungAverageWarning):
        read(ema, model)


def test_saving_the_state_does_not_warn():
    model, opt = stepped(5)
    opt.state_dict()
    fused_ema.FusedScaledSGD(model.parameters(), ema_decay=0.99).load_state_dict(opt.state_dict())

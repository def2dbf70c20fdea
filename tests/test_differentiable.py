"""differentiable=True: gradients flow through the steps as they do through torch's."""

from __future__ import annotations

import pytest
import torch
from optimizers import OPTIMIZERS, each_in_torch

from fused_ema import FusedScaledAdamW, FusedScaledSGD


def through_steps(cls, kwargs, steps: int = 3) -> torch.Tensor:
    """Derivative of the parameters after some steps with respect to what scaled the gradients."""
    start = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    param = start.clone()
    optimizer = cls([param], differentiable=True, **kwargs)
    for _ in range(steps):
        param.grad = start * start + param
        optimizer.step()
    (grad,) = torch.autograd.grad(param.sum(), start)
    return grad


@pytest.mark.parametrize(
    ("optimizer", "setting"),
    [(o, name) for o in OPTIMIZERS.values() for name in o.settings_in_torch],
    ids=str,
)
def test_gradients_through_several_steps_equal_torchs(optimizer, setting):
    kwargs = {"lr": 0.1, "weight_decay": 0.1, **optimizer.settings[setting]}
    found = through_steps(optimizer.ours, {**kwargs, "ema_decay": 0.9})
    torch.testing.assert_close(found, through_steps(optimizer.theirs, kwargs))


def test_averages_stay_out_of_the_graph():
    teacher = torch.nn.Parameter(torch.ones(3))
    param = torch.ones(3, requires_grad=True).clone()
    optimizer = FusedScaledSGD(
        [param], lr=0.1, differentiable=True, ema_decay=0.9, teacher=[teacher]
    )
    param.grad = torch.ones(3, requires_grad=True).clone()
    optimizer.step()
    assert param.requires_grad
    assert teacher.grad_fn is None
    torch.testing.assert_close(teacher.detach(), torch.full((3,), 0.99))


def after_steps(cls, named: dict[str, torch.Tensor], steps: int = 2, **options) -> torch.Tensor:
    """The weights after some steps at hyper-parameters that are tensors; ``betas`` from two."""
    fields = dict(named)
    if "beta1" in fields:
        fields["betas"] = (fields.pop("beta1"), fields.pop("beta2"))
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    param = start.clone()
    optimizer = cls([param], differentiable=True, **fields, **options)
    for step in range(steps):
        param.grad = start.detach() * (step - 0.5) + 0.4
        optimizer.step()
    return param


def leaves(**values: float) -> dict[str, torch.Tensor]:
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
    return {k: tensor.requires_grad_() for k, tensor in tensors.items()}


@pytest.mark.parametrize("maximize", [False, True])
@each_in_torch
def test_gradients_reach_hyper_parameters_as_in_torch(optimizer, maximize):
    found = []
    for cls in (optimizer.ours, optimizer.theirs):
        tensors = leaves(**{name: optimizer.numbers[name] for name in optimizer.numbers_in_torch})
        loss = after_steps(cls, tensors, maximize=maximize).square().sum()
        found.append(torch.autograd.grad(loss, list(tensors.values())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kappa", [1.0, 2.5])
@pytest.mark.parametrize(
    ("optimizer", "options"), [(o, own) for o in OPTIMIZERS.values() for own in o.formulas], ids=str
)
def test_gradients_of_hyper_parameters_are_finite_differences(optimizer, options, kappa):
    tensors = leaves(**{k: value for k, value in optimizer.numbers.items() if k not in options})
    if options.get("beta_scaling") == "linear":
        kappa = 1.0 + kappa / 10.0

    def weights(*values):
        named = dict(zip(tensors, values, strict=True))
        return after_steps(optimizer.ours, named, 3, kappa=kappa, **options)

    assert torch.autograd.gradcheck(weights, tuple(tensors.values()), raise_exception=True)


def test_a_weight_decay_of_zero_has_a_gradient():
    """The penalty's share is there whatever its size: -lr*p after one step of SGD."""
    tensors = leaves(weight_decay=0.0)
    loss = after_steps(FusedScaledSGD, tensors, 1, lr=0.1).sum()
    (found,) = torch.autograd.grad(loss, list(tensors.values()))
    assert float(found) == pytest.approx(-0.1 * (1.0 - 2.0 + 3.0))


def test_every_step_has_a_graph_of_its_own():
    (lr,) = leaves(lr=0.1).values()
    param = torch.ones(2, dtype=torch.float64, requires_grad=True).clone()
    optimizer = FusedScaledSGD([param], lr=lr, differentiable=True)
    for _ in range(2):
        param.grad = torch.ones(2, dtype=torch.float64)
        with torch.no_grad():  # the step's graph is asked for by differentiable=True
            optimizer.step()
        (found,) = torch.autograd.grad(param.sum(), lr)
        assert float(found) == -2.0
        param.detach_()
        param.requires_grad_()
        param = optimizer.param_groups[0]["params"][0] = param.clone()


def test_a_float32_step_takes_what_it_is_given():
    lr = torch.tensor([0.1], requires_grad=True)
    betas = torch.tensor([0.8, 0.9], requires_grad=True)
    param = torch.ones(2, requires_grad=True).clone()
    optimizer = FusedScaledAdamW([param], lr=lr, betas=betas, differentiable=True)
    param.grad = torch.ones(2)
    optimizer.step()
    param.sum().backward()
    # the first step's size is lr whatever the betas, beside the decay of lr*0.01*p
    torch.testing.assert_close(lr.grad, torch.tensor([-2.02]))
    torch.testing.assert_close(betas.grad, torch.zeros(2), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", ["kappa", "ema_decay"])
def test_where_no_gradient_reaches_a_tensor_that_requires_it_is_refused(name):
    given = {name: torch.tensor(0.5, requires_grad=True)}
    param = torch.ones(2, requires_grad=True).clone()
    with pytest.raises(ValueError, match=f"{name} requires grad.*not kappa and ema_decay"):
        FusedScaledSGD([param], differentiable=True, **given)
    with pytest.raises(ValueError, match="lr requires grad"):
        FusedScaledSGD([param], lr=torch.tensor(0.5, requires_grad=True))

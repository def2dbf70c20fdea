"""What belongs to which of several optimizers, groups and modules."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_ema import FusedEMA, FusedScaledAdamW, FusedScaledSGD, ema_state_dict


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.norm, self.b = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.register_buffer("cache", torch.full((2,), float(seed)), persistent=False)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.randn(8, 3) + 5).square().mean().backward()


def same(module: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, module.state_dict().values(), other.state_dict().values()))


def split(model: Net) -> tuple[list, list]:
    return [model.a.weight, model.b.weight], [
        *model.norm.parameters(),
        model.a.bias,
        model.b.bias,
    ]


# copy_ema_to


def test_a_copy_needs_the_students_buffers():
    model, other = Net(), Net(1)
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.9)
    backward(model)
    opt.step()
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=r"'norm\.running_mean'.*model=<.*buffers=False"):
        opt.copy_ema_to(other)
    assert same(other, before)
    opt.copy_ema_to(other, buffers=False)
    assert torch.equal(other.norm.running_mean, before.norm.running_mean)
    assert torch.equal(other.a.weight, opt.state[model.a.weight]["ema"])
    opt.copy_ema_to(nn.ModuleList([model]))  # whose buffers are the student's
    assert torch.equal(model.a.weight, opt.state[model.a.weight]["ema"])


def test_buffers_that_are_not_saved_are_not_asked_for():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.register_buffer("cache", torch.ones(1), persistent=False)
    FusedScaledSGD(model.parameters(), ema_decay=0.9).copy_ema_to(other)
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize("mode", ["copy", "average", "leave"])
def test_a_copy_computes_what_the_average_computes(mode):
    model, other = Net(), Net(1)
    groups = [
        {"params": model.a.parameters()},
        {"params": [*model.norm.parameters(), *model.b.parameters()], "ema_decay": None},
    ]
    opt = FusedScaledSGD(groups, lr=0.1, ema_decay=0.5, model=model, ema_buffers=mode)
    for _ in range(3):
        backward(model)
        opt.step()
    opt.copy_ema_to(other)
    x = torch.randn(4, 3)
    with opt.ema_weights():
        expected = model.eval()(x)
    assert torch.equal(other.eval()(x), expected)
    assert torch.equal(other.cache, model.cache)


@pytest.mark.parametrize("shape", [(1,), (7,)])
def test_a_buffer_of_another_shape_is_refused_before_anything_is_copied(shape):
    model, other = Net(), Net(1)
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.9, model=model)
    other.norm.running_var = torch.zeros(shape)
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=r"'norm\.running_var' has shape"):
        opt.copy_ema_to(other)
    assert same(other, before)
    other.norm.running_var = torch.zeros(3)
    other.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ValueError, match="the buffer 'extra'"):
        opt.copy_ema_to(other)


# add_param_group


@pytest.mark.parametrize("given", ["module", "iterator"])
def test_an_added_group_finds_its_part_of_the_teacher(given):
    model, teacher = Net(), Net(1)
    params = list(model.parameters())
    ema = teacher if given == "module" else teacher.named_parameters()
    opt = FusedScaledSGD(params[:4], lr=0.1, ema_decay=0.0, teacher=ema, model=model)
    opt.add_param_group({"params": params[4:]})
    backward(model)
    opt.step()
    assert torch.equal(teacher.b.weight, model.b.weight)
    assert opt.state[model.b.weight]["ema"] is teacher.b.weight


def test_an_added_group_that_the_teacher_lacks():
    model, teacher = Net(), Net(1)
    params, theirs = (list(m.named_parameters()) for m in (model, teacher))
    opt = FusedScaledSGD(params[:4], ema_decay=0.0, teacher=theirs[:4])
    with pytest.raises(ValueError, match=r"teacher: it has no parameter 'b\.weight'"):
        opt.add_param_group({"params": params[4:]})
    assert len(opt.param_groups) == 1


def test_a_network_that_grows_with_its_teacher():
    model, teacher = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    opt = FusedScaledSGD(model.parameters(), lr=0.1, ema_decay=0.0, teacher=teacher, model=model)
    model.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"teacher: it has no parameter '1\.weight'"):
        opt.add_param_group({"params": model[1].parameters()})
    teacher.append(nn.Linear(2, 2))
    opt.add_param_group({"params": model[1].parameters()})
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
    assert same(teacher, model)


@pytest.mark.parametrize("kind", ["module", "tensors", "FusedEMA"])
def test_an_added_group_is_never_forgotten_by_the_teacher(kind):
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    teachers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    given = iter(teachers[0].parameters()) if kind == "tensors" else teachers[0]
    group = {"params": list(second.parameters())}
    if kind == "FusedEMA":
        opt = torch.optim.SGD(first.parameters(), lr=0.1)
        access = FusedEMA(opt, 0.0, teacher=given)
        opt.add_param_group(dict(group))
        refused = opt.step
    else:
        opt = access = FusedScaledSGD(first.parameters(), lr=0.1, ema_decay=0.0, teacher=given)

        def refused():
            opt.add_param_group(dict(group))

    for param in (*first.parameters(), *second.parameters()):
        param.grad = torch.ones_like(param)
    before = copy.deepcopy(first)
    with pytest.raises(ValueError, match=r"made with a teacher.*'teacher'.*ema_decay=None"):
        refused()
    assert same(first, before)
    assert len(access.param_groups) == 1
    access.add_param_group({**group, "teacher": teachers[1].parameters()})
    opt.step()
    assert same(teachers[1], second)
    assert same(teachers[0], first)


def test_an_added_group_without_an_average_needs_no_teacher():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    opt = FusedScaledSGD(first.parameters(), ema_decay=0.9, teacher=nn.Linear(2, 2))
    opt.add_param_group({"params": second.parameters(), "ema_decay": None})
    opt.step()
    assert "ema" not in opt.state[second.weight]


# several optimizers on one model


def two(model: Net, teacher: Net, **options):
    matrices, rest = split(model)
    options = {"ema_decay": 0.5, "teacher": teacher, "model": model, **options}
    sgd = FusedScaledSGD(matrices, lr=0.1, **options)
    adamw = torch.optim.AdamW(rest, lr=0.1)
    return sgd, adamw, FusedEMA(adamw, **options)


def follow(mean: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return 0.5 * mean + 0.5 * source.double()


@pytest.mark.parametrize("order", ["always", "changing"])
def test_a_teachers_buffers_move_once_a_step(order):
    model, teacher = Net(), Net(1)
    mean = teacher.norm.running_mean.double()
    sgd, adamw, _ = two(model, teacher, ema_buffers="average")
    for step in range(6):
        backward(model)
        both = [sgd, adamw]
        for opt in reversed(both) if order == "changing" and step in (1, 2, 4) else both:
            opt.step()
        mean = follow(mean, model.norm.running_mean)
        torch.testing.assert_close(teacher.norm.running_mean.double(), mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", ["gone", "idle", "removed"])
def test_another_optimizer_takes_the_buffers_over(how):
    model, teacher = Net(), Net(1)
    sgd, adamw, keeper = two(model, teacher)
    backward(model)
    keeper.step() if how == "removed" else sgd.step()
    if how == "gone":
        del sgd
        gc.collect()
    other = sgd if how == "removed" else adamw
    if how != "gone":  # it may be the other's turn still
        backward(model)
        other.step()
    backward(model)
    other.step()
    assert torch.equal(teacher.norm.running_mean, model.norm.running_mean)


def test_nested_contexts_show_the_whole_average():
    model, teacher = Net(), Net(1)
    sgd, adamw, keeper = two(model, teacher, ema_buffers="average")
    for _ in range(2):
        backward(model)
        sgd.step()
        adamw.step()
    before, held = copy.deepcopy(model), copy.deepcopy(teacher)
    for both in ([sgd, keeper], [keeper, sgd]):
        with contextlib.ExitStack() as stack:
            for access in both:
                stack.enter_context(access.ema_weights())
            assert same(model, held)
            for access in both:
                with pytest.raises(RuntimeError, match=r"inside ema_weights\(\)"):
                    access.step()
        assert same(model, before)
        assert same(teacher, held)
        with both[0].ema_weights():
            assert torch.equal(model.norm.running_mean, held.norm.running_mean)
    with sgd.ema_weights(), pytest.raises(RuntimeError, match="another optimizer"):
        adamw.step()
    assert same(teacher, held)


def test_the_whole_average_of_several_optimizers():
    model = Net()
    matrices, rest = split(model)
    options = {"model": model, "ema_buffers": "average"}
    sgd = FusedScaledSGD(matrices, lr=0.1, ema_decay=(0.5, 0.9), **options)
    adamw = torch.optim.AdamW(rest[1:], lr=0.1)
    keeper = FusedEMA(adamw, 0.5)
    plain = FusedScaledSGD(rest[:1], lr=0.1)
    for _ in range(2):
        backward(model)
        for opt in (sgd, adamw, plain):
            opt.step()
    whole = ema_state_dict(model, iter([plain, keeper, sgd]))
    assert list(whole) == list(model.state_dict())
    expected = {**keeper.ema_state_dict(model), "norm.weight": model.norm.weight}
    own = sgd.ema_state_dict(model)
    names = ["a.weight", "b.weight", *(n for n in own if n.startswith("norm.run"))]
    expected |= {name: own[name] for name in names}
    assert all(map(torch.equal, whole.values(), expected.values()))
    assert not torch.equal(whole["norm.running_mean"], model.norm.running_mean)
    second = ema_state_dict(model, [sgd, keeper], index=1)
    assert torch.equal(second["a.weight"], sgd.state[model.a.weight]["ema_1"])
    assert torch.equal(second["a.bias"], model.a.bias)


def test_what_several_optimizers_cannot_mean():
    model = Net()
    matrices, rest = split(model)
    sgd = FusedScaledSGD(matrices, ema_decay=0.5)
    again = FusedScaledAdamW([*rest, model.b.weight], ema_decay=0.5)
    with pytest.raises(ValueError, match=r"two of them average the parameter 'b\.weight'"):
        ema_state_dict(model, [sgd, again])
    with pytest.raises(ValueError, match=r"two of them average the parameter of shape \(2, 3\)"):
        ema_state_dict(Net(), [sgd, again])
    with pytest.raises(TypeError, match=r"entry 1 is a SGD; allowed: .*FusedEMA"):
        ema_state_dict(model, [sgd, torch.optim.SGD(rest)])
    with pytest.raises(IndexError, match="index=1: no optimizer"):
        ema_state_dict(model, [sgd], index=1)
    with pytest.raises(IndexError, match="index=0: no optimizer"):
        ema_state_dict(model, [])
    with pytest.raises(IndexError, match=r"index=0: no optimizer .*made without ema_decay"):
        ema_state_dict(model, [FusedScaledSGD(rest)])
    with pytest.raises(ValueError, match="model holds none"):
        ema_state_dict(Net(), [sgd])


def test_one_optimizer_a_parameter_stepped_in_the_backward_pass():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(75)))
    params = list(model.parameters())
    opts = {p: FusedScaledSGD([p], lr=0.1, ema_decay=0.5, model=model) for p in params}
    right = {p: p.detach().double().clone() for p in params}

    def step(param: nn.Parameter) -> None:
        opts[param].step()
        param.grad = None

    for param in params:
        param.register_post_accumulate_grad_hook(step)
    for _ in range(2):
        model(torch.randn(4, 2)).square().mean().backward()
        right = {p: follow(average, p.detach()) for p, average in right.items()}
    whole = ema_state_dict(model, opts.values())
    for param, value in zip(params, whole.values(), strict=True):
        torch.testing.assert_close(value.double(), right[param], rtol=1e-6, atol=1e-6)


def test_a_step_that_holds_no_buffers_does_not_look_for_them(monkeypatch):
    model = Net()
    opts = [FusedScaledSGD([p], ema_decay=0.5, model=model) for p in model.parameters()]
    monkeypatch.setattr(model, "named_buffers", None)
    for opt in opts:
        opt.step()


def test_the_documented_example_runs():
    text = (Path(__file__).parents[1] / "docs/api/averages.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    names: dict[str, object] = {}
    exec(compile(block, "averages.md", "exec"), names)
    model, average = names["model"], names["average"]
    assert all(not torch.equal(average[name], p) for name, p in model.named_parameters())
    assert math.isfinite(names["loss"])

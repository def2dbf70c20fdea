"""A teacher network as the average: pairing, aliasing, buffers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fused_ema
from fused_ema import FusedScaledAdamW, FusedScaledSGD


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def give_gradients(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.randn_like(param)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()


def test_teacher_parameters_are_the_average(backend):
    model = student()
    teacher = copy.deepcopy(model)
    expected = [p.detach().clone() for p in teacher.parameters()]
    optimizer = FusedScaledSGD(
        model.parameters(), lr=0.1, ema_decay=0.9, teacher=teacher.parameters(), backend=backend
    )
    for _ in range(3):
        give_gradients(model)
        optimizer.step()
        for average, param in zip(expected, model.parameters(), strict=True):
            average.lerp_(param.detach(), 1 - 0.9)
    for average, param in zip(expected, teacher.parameters(), strict=True):
        torch.testing.assert_close(param.detach(), average, rtol=1e-6, atol=1e-7)
    for p, t in zip(model.parameters(), teacher.parameters(), strict=True):
        assert optimizer.state[p]["ema"] is t


def test_teacher_keeps_its_own_start():
    model, teacher = student(), student()
    with torch.no_grad():
        for param in teacher.parameters():
            param.fill_(7.0)
    optimizer = FusedScaledSGD(
        model.parameters(), lr=0.0, ema_decay=1.0, teacher=teacher.parameters(), backend="native"
    )
    give_gradients(model)
    optimizer.step()
    assert all(bool((param == 7.0).all()) for param in teacher.parameters())


def test_count_and_shape_mismatches_name_the_first():
    model = student()
    with pytest.raises(ValueError, match="it has 5 tensors, the optimizer averages 6"):
        FusedScaledSGD(model.parameters(), ema_decay=0.9, teacher=list(student().parameters())[:5])
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 5))
    with pytest.raises(
        ValueError, match=r"'2.weight'.* has shape \(5, 3\), its parameter \(2, 3\)"
    ):
        FusedScaledSGD(model.parameters(), ema_decay=0.9, teacher=other, ema_buffers="leave")
    with pytest.raises(ValueError, match=r"no parameter '1\.weight'"):
        FusedScaledSGD(
            model.named_parameters(), ema_decay=0.9, teacher=nn.Sequential(nn.Linear(4, 3))
        )
    with pytest.raises(ValueError, match="its parameter 'weight' is not in the student"):
        FusedScaledSGD(model.named_parameters(), ema_decay=0.9, teacher=nn.Linear(4, 3))


def test_rejects_a_teacher_that_cannot_hold_the_average():
    model = student()
    with pytest.raises(ValueError, match=r"bfloat16; allowed .*torch\.float32"):
        FusedScaledSGD(model.parameters(), ema_decay=0.9, teacher=student().bfloat16().parameters())
    with pytest.raises(ValueError, match="shares memory"):
        FusedScaledSGD(model.parameters(), ema_decay=0.9, teacher=model.parameters())
    shared = torch.zeros(10)
    pair = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    with pytest.raises(ValueError, match="shares memory"):
        FusedScaledSGD(pair, ema_decay=0.9, teacher=[shared[:4], shared[3:7]])
    with pytest.raises(ValueError, match="ema_decay=None"):
        FusedScaledSGD(model.parameters(), teacher=student().parameters())


def test_several_groups_need_names():
    model, teacher = student(), student()
    groups = [{"params": list(model[i].parameters())} for i in (0, 2)]
    for given in (teacher, list(teacher.parameters())):
        with pytest.raises(ValueError, match="pass model="):
            FusedScaledSGD(groups, ema_decay=0.9, teacher=given, ema_buffers="leave")
    groups = [{"params": model[2].parameters()}, {"params": model[0].parameters(), "lr": 1.0}]
    optimizer = FusedScaledSGD(groups, ema_decay=0.0, teacher=teacher, model=model)
    give_gradients(model)
    optimizer.step()
    torch.testing.assert_close(teacher[2].weight, model[2].weight, rtol=0, atol=0)
    torch.testing.assert_close(teacher[0].bias, model[0].bias, rtol=0, atol=0)


def test_a_predictor_without_an_average_as_in_byol():
    online, target, predictor = student(), student(), nn.Linear(2, 2)
    optimizer = FusedScaledSGD(
        [
            {"params": online.parameters(), "teacher": target.parameters()},
            {"params": predictor.parameters(), "ema_decay": None},
        ],
        lr=0.1,
        ema_decay=0.0,
    )
    for param in [*online.parameters(), *predictor.parameters()]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(target[0].weight, online[0].weight)
    assert "ema" not in optimizer.state[predictor.weight]
    assert "teacher" not in optimizer.param_groups[0]


def test_group_dicts_can_be_used_again():
    model = student()
    group = {"params": list(model.parameters()), "teacher": list(student().parameters())}
    for _ in range(2):
        optimizer = FusedScaledSGD([group], lr=0.1, ema_decay=0.0)
        give_gradients(model)
        optimizer.step()
        assert optimizer.state[model[0].weight]["ema"] is group["teacher"][0]


def test_a_bad_step_with_buffers_moves_nothing():
    model = student()
    optimizer = FusedScaledSGD(
        model.parameters(), lr=0.1, ema_decay=0.9, model=model, ema_buffers="average"
    )
    train(model, optimizer, 1)
    before = {key: value.clone() for key, value in optimizer.ema_state_dict(model).items()}
    give_gradients(model)
    model[1].running_mean = torch.zeros(7)
    optimizer.param_groups[0]["kappa"] = -1.0
    with pytest.raises(ValueError, match="kappa"):
        optimizer.step()
    model[1].running_mean = before["1.running_mean"]
    for key, value in optimizer.ema_state_dict(model).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("mode", ["copy", "average"])
def test_buffers_follow_into_other_modules(mode):
    model, other = student(), student()
    optimizer = FusedScaledSGD(
        model.parameters(), lr=0.1, ema_decay=0.9, model=model, ema_buffers=mode
    )
    train(model, optimizer)
    expected = optimizer.ema_state_dict(model)
    optimizer.copy_ema_to(other)
    for key, value in other.state_dict().items():
        assert torch.equal(value, expected[key]), key
    wrapped = optimizer.ema_state_dict(nn.DataParallel(model))
    assert torch.equal(wrapped["module.1.running_mean"], expected["1.running_mean"])
    part = optimizer.ema_state_dict(model[1])
    assert torch.equal(part["running_mean"], expected["1.running_mean"])


def test_copying_to_a_part_touches_that_part_alone():
    model = student()
    optimizer = FusedScaledSGD(model.parameters(), lr=0.1, ema_decay=0.9)
    train(model, optimizer)
    outside = model[0].weight.detach().clone()
    optimizer.copy_ema_to(model[2])
    assert torch.equal(model[0].weight, outside)
    assert torch.equal(model[2].weight, optimizer.state[model[2].weight]["ema"])


def test_added_group_brings_its_teacher_or_is_not_added():
    first, second, teacher = nn.Linear(2, 2), nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = FusedScaledSGD(first.parameters(), lr=0.1, ema_decay=0.0)
    with pytest.raises(ValueError, match="shape"):
        optimizer.add_param_group({"params": second.parameters(), "teacher": first.parameters()})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": second.parameters(), "teacher": teacher.parameters()})
    give_gradients(first)
    give_gradients(second)
    optimizer.step()
    assert torch.equal(teacher.weight, second.weight)


def test_teacher_stays_aliased_after_load_state_dict(backend):
    model, teacher = student(), student()
    kwargs = {"lr": 0.1, "ema_decay": 0.5, "backend": backend}
    optimizer = FusedScaledAdamW(model.parameters(), teacher=teacher.parameters(), **kwargs)
    give_gradients(model)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    expected = [p.detach().clone() for p in teacher.parameters()]
    give_gradients(model)
    optimizer.step()
    optimizer.load_state_dict(saved)
    for param, tensor, value in zip(
        model.parameters(), teacher.parameters(), expected, strict=True
    ):
        assert torch.equal(tensor, value)
        optimizer.state[param]["exp_avg"].zero_()
    give_gradients(model)
    optimizer.step()
    for param, tensor in zip(model.parameters(), teacher.parameters(), strict=True):
        assert optimizer.state[param]["ema"] is tensor


def test_teacher_elsewhere_is_an_error_at_the_step():
    model, teacher = student(), student()
    optimizer = FusedScaledSGD(model.parameters(), ema_decay=0.9, teacher=teacher.parameters())
    model.double()
    give_gradients(model)
    with pytest.raises(ValueError, match=r"dtype torch\.float32"):
        optimizer.step()


@pytest.mark.parametrize("mode", ["copy", "average", "leave"])
def test_buffers(mode):
    model, teacher = student(), student()
    before = teacher[1].running_mean.clone()
    optimizer = FusedScaledSGD(
        model.parameters(), lr=0.1, ema_decay=0.75, teacher=teacher, model=model, ema_buffers=mode
    )
    train(model, optimizer, steps=1)
    mean = model[1].running_mean
    expected = {"copy": mean, "average": before.lerp(mean, 0.25), "leave": before}[mode]
    torch.testing.assert_close(teacher[1].running_mean, expected, rtol=1e-6, atol=1e-7)
    assert teacher[1].num_batches_tracked.item() == (0 if mode == "leave" else 1)


def test_buffers_are_never_forgotten_in_silence():
    model, teacher = student(), student()
    with pytest.raises(ValueError, match=r"it has buffers \(first: '1.running_mean'\)"):
        FusedScaledSGD(model.parameters(), ema_decay=0.9, teacher=teacher)
    with pytest.raises(ValueError, match="ema_buffers='sum' is not known"):
        FusedScaledSGD(
            model.parameters(), ema_decay=0.9, teacher=teacher, model=model, ema_buffers="sum"
        )
    with pytest.raises(ValueError, match="needs model="):
        FusedScaledSGD(model.parameters(), ema_decay=0.9, ema_buffers="average")


def test_averaged_buffers_without_a_teacher_are_saved_and_swapped():
    model = student()
    optimizer = FusedScaledSGD(
        model.parameters(), lr=0.1, ema_decay=(0.5, 0.9), model=model, ema_buffers="average"
    )
    train(model, optimizer)
    averaged = optimizer.ema_state_dict(model, index=1)["1.running_mean"].clone()
    own = model[1].running_mean.clone()
    assert not torch.equal(averaged, own)
    with optimizer.ema_weights(index=1):
        assert torch.equal(model[1].running_mean, averaged)
    assert torch.equal(model[1].running_mean, own)

    resumed = FusedScaledSGD(
        model.parameters(), lr=0.1, ema_decay=(0.5, 0.9), model=model, ema_buffers="average"
    )
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.ema_state_dict(model, index=1)["1.running_mean"], averaged)


def test_a_teacher_for_every_group_is_checked_once(monkeypatch):
    calls = []
    real = fused_ema.ema.teacher.check_disjoint
    monkeypatch.setattr(
        "fused_ema.ema.teachers.check_disjoint", lambda *args: calls.append(args) or real(*args)
    )
    shared = torch.zeros(4)
    groups = [
        {"params": [nn.Parameter(torch.ones(3))], "teacher": [torch.ones(3)]} for _ in range(9)
    ]
    opt = FusedScaledSGD(groups, ema_decay=0.9)
    assert [len(teachers) for teachers, _ in calls] == [9]
    more = {"params": [nn.Parameter(torch.ones(3))], "teacher": [shared[:3]]}
    opt.add_param_group(more)
    assert [len(teachers) for teachers, _ in calls] == [9, 10]
    with pytest.raises(ValueError, match="shares memory"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))], "teacher": [shared[1:]]})
    assert len(opt.param_groups) == 10
    with pytest.raises(ValueError, match="shares memory"):
        FusedScaledSGD([*groups[1:], {**groups[0], "teacher": groups[1]["params"]}], ema_decay=0.9)

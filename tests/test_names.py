"""Wrappers around a student or a teacher do not keep their tensors from being paired."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fused_ema import FusedScaledSGD, load_ema
from fused_ema.names import WRAPPERS, bare, renamed


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 2)))


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ddp(module: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module)


def compiled_inside(module: nn.Sequential) -> nn.Sequential:
    module[2] = torch.compile(module[2])
    return module


def ddp_inside(module: nn.Sequential) -> nn.Sequential:
    module[1], module[2] = ddp(module[1]), ddp(module[2])
    return module


WRAPS = {
    "DDP": ddp,
    "DataParallel": nn.DataParallel,
    "compile": torch.compile,
    "compile of DDP": lambda m: torch.compile(ddp(m)),
    "compile inside": compiled_inside,
    "DDP inside": ddp_inside,
    "all": lambda m: ddp(torch.compile(compiled_inside(m))),
}
wraps = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


def values(model: nn.Module) -> list[torch.Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


def train(model: nn.Module, opt: FusedScaledSGD, steps: int = 2) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    for buffer in model.buffers():
        buffer.add_(1)
    for _ in range(steps):
        opt.step()


@wraps
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_teachers(wrap, which):
    model, teacher, right, following = network(), network(1), network(), network(1)
    plain = FusedScaledSGD(
        right.parameters(), lr=0.1, ema_decay=0.5, teacher=following, model=right
    )
    train(right, plain)
    student = wrap(model) if which != "teacher" else model
    target = wrap(teacher) if which != "student" else teacher
    opt = FusedScaledSGD(student.parameters(), lr=0.1, ema_decay=0.5, teacher=target, model=student)
    train(student, opt)
    assert all(map(torch.equal, values(target), values(following)))
    with opt.ema_weights():
        assert all(map(torch.equal, values(student), values(following)))


@wraps
def test_names_alone_and_the_teacher_of_a_group(wrap):
    model, teacher = wrap(network()), network(1)
    groups = [{"params": list(model.named_parameters()), "teacher": teacher}]
    with pytest.warns(UserWarning, match=r"with buffers \(first: '1\.running_mean'\)"):
        FusedScaledSGD(groups, lr=0.1, ema_decay=0.0)
    groups[0]["teacher"] = list(teacher.named_parameters())
    opt = FusedScaledSGD(groups, lr=0.1, ema_decay=0.0)
    train(model, opt)
    assert all(map(torch.equal, teacher.parameters(), model.parameters()))


@wraps
@pytest.mark.parametrize("mode", ["copy", "average"])
def test_copies_and_foreign_averages(wrap, mode):
    model, source, target = network(), network(1), network(2)
    student = wrap(model)
    options = {"model": student, "ema_buffers": mode}
    opt = FusedScaledSGD(student.parameters(), lr=0.1, ema_decay=0.5, **options)
    train(student, opt)
    opt.copy_ema_to(target)
    assert all(map(torch.equal, values(target), opt.ema_state_dict(student).values()))
    for state in (source.state_dict(), wrap(copy.deepcopy(source)).state_dict()):
        train(student, opt)
        load_ema(opt, student, state)
        opt.copy_ema_to(target)
        assert all(map(torch.equal, target.parameters(), source.parameters()))


def test_a_wrapper_put_in_later():
    model, teacher = network(), network(1)
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.5, teacher=teacher, model=model)
    compiled_inside(ddp_inside(model))
    train(model, opt)
    assert torch.equal(teacher[1].running_mean, torch.ones(3))
    teacher[1].running_mean.fill_(7.0)
    with opt.ema_weights():
        assert torch.equal(model[1].module.running_mean, torch.full((3,), 7.0))


@wraps
def test_averaged_buffers_load_into_another_wrapping(wrap):
    model, twin = wrap(network()), network()
    options = {"ema_decay": 0.5, "ema_buffers": "average"}
    opt = FusedScaledSGD(model.parameters(), model=model, **options)
    train(model, opt)
    again = FusedScaledSGD(twin.parameters(), model=twin, **options)
    again.load_state_dict(opt.state_dict())
    expected = opt.ema_state_dict(model).values()
    assert all(map(torch.equal, again.ema_state_dict(twin).values(), expected))


def test_the_students_names_are_the_modules():
    model, teacher = network(), network(1)
    student = ddp(model)
    # names given are the inner module's, and the student knows parameters that are not given
    named = [entry for entry in model.named_parameters() if "bias" not in entry[0]]
    opt = FusedScaledSGD(named, lr=0.1, ema_decay=0.0, model=student, teacher=teacher)
    train(model, opt)
    assert torch.equal(teacher[0].weight, model[0].weight)


class Named(nn.Module):
    """A module that has a part called ``module``, and another."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.module, self.head = network(seed), nn.Linear(2, 2)


def test_a_part_that_is_called_module_is_told_apart():
    model, teacher = Named(0), Named(1)
    groups = [
        {"params": list(model.module.parameters())},
        {"params": list(model.head.parameters()), "ema_decay": None},
    ]
    # the teacher lacks the head, so that all of its names start with "module."
    tensors = [entry for entry in teacher.named_parameters() if entry[0].startswith("module")]
    options = {"lr": 0.1, "ema_decay": 0.0, "model": model, "ema_buffers": "leave"}
    opt = FusedScaledSGD(groups, teacher=tensors, **options)
    train(model, opt)
    assert torch.equal(teacher.module[0].weight, model.module[0].weight)
    with pytest.raises(ValueError, match=r"teacher: its parameter '0\.weight' is not in the stud"):
        FusedScaledSGD(groups, teacher=model.module, **options)


def test_an_equal_name_is_never_given_away():
    entries = {"module.x": 1, "module.y": 2}
    assert renamed(entries, ["module.x", "x", "q"]) == entries


parts = st.sampled_from(["a", "b", *sorted(WRAPPERS)])
names = st.sets(st.lists(parts, min_size=1, max_size=5).map(".".join), min_size=1, max_size=8)


@given(names, st.sampled_from(["module.", "_orig_mod.", "module._orig_mod."]))
def test_bare_names_stay_different_and_forget_wrappers(given_names, wrapper):
    # a module's names are no beginnings of each other
    leaves = {n for n in given_names if not any(m.startswith(n + ".") for m in given_names)}
    short = bare(leaves)
    assert len(set(short.values())) == len(leaves)
    wrapped = {wrapper + name: name for name in leaves}
    assert bare(wrapped) == {outer: short[name] for outer, name in wrapped.items()}


@given(names, names)
def test_no_entry_is_lost_and_equal_names_belong_together(ours, theirs):
    entries = {name: name for name in theirs}
    found = renamed(entries, ours)
    assert list(found.values()) == list(entries)
    assert all(found[name] == name for name in ours & theirs)

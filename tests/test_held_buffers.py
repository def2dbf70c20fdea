"""Averaged buffers follow the module's state dict, and begin at the first step."""

from __future__ import annotations

import copy

import pytest
import torch
import twins
from torch import nn

from fused_ema import FusedEMA, FusedScaledSGD


class Net(nn.Module):
    """A buffer of every kind; ``cache`` is made by the first forward pass."""

    def __init__(self, persistent: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("cache", None, persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = torch.full((2,), 5.0)
        with torch.no_grad():
            self.mean += 1.0
        return self.layer(x)


def step(model: nn.Module, opt) -> None:
    opt.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    opt.step()


def make(model, kind: str = "average", decay=0.5, **options):
    if kind == "average":
        options["ema_buffers"] = "average"
        return FusedScaledSGD(model.parameters(), lr=0.1, ema_decay=decay, model=model, **options)
    teacher = copy.deepcopy(model).requires_grad_(False)
    options.setdefault("ema_buffers", "average" if kind == "averaging teacher" else "copy")
    opt = FusedScaledSGD(
        model.parameters(), lr=0.1, ema_decay=decay, model=model, teacher=teacher, **options
    )
    opt.teacher_for_test = teacher
    return opt


KINDS = ("average", "teacher", "averaging teacher")


def test_averages_begin_as_the_buffers_are_at_the_first_step():
    model = Net()
    opt = make(model, decay=(0.5, 0.75))
    model.mean.fill_(40.0)  # pretrained
    step(model, opt)
    step(model, opt)
    for index, rho in enumerate((0.5, 0.75)):
        found = opt.ema_state_dict(model, index)["mean"]
        torch.testing.assert_close(found, torch.full((2,), rho * 41.0 + (1 - rho) * 42.0))


@pytest.mark.parametrize("every", [1, 3])
def test_they_begin_where_the_averages_of_parameters_do(every):
    model = Net()
    opt = make(model, ema_every=every)
    expected = None
    for count in range(1, 7):
        step(model, opt)
        expected = model.mean.clone() if expected is None else expected
        if count % every == 0:
            expected = expected.lerp(model.mean, 1 - 0.5**every)
        torch.testing.assert_close(opt.ema_state_dict(model)["mean"], expected)


def test_beside_another_optimizer_they_begin_before_its_step():
    model = Net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = FusedEMA(inner, 0.5, model=model, ema_buffers="average")
    model.mean.fill_(8.0)
    step(model, inner)
    assert torch.equal(ema.ema_state_dict(model)["mean"], torch.full((2,), 9.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", [None, torch.ones(2), torch.ones(7)], ids=str)
def test_a_cache_is_neither_saved_nor_demanded(cached, kind):
    model = Net()
    step(model, opt := make(model, kind))
    saved = copy.deepcopy(opt.state_dict())
    held = [e["ema_buffers"]["0"] for e in saved["state"].values() if "ema_buffers" in e]
    assert [set(names) for names in held] == [{"mean"}]
    other = Net()
    other.cache = cached
    resumed = make(other, kind)
    resumed.load_state_dict(saved)
    right = opt.ema_state_dict(model)["mean"]
    assert torch.equal(resumed.ema_state_dict(other)["mean"], right)
    with resumed.ema_weights():
        if cached is not None:
            assert torch.equal(other.cache, cached)
    step(other, resumed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_that_is_not_there_yet_is_loaded(kind):
    model = Net(persistent=True)
    step(model, opt := make(model, kind))
    step(model, opt)
    resumed = make(other := Net(persistent=True), kind)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    with torch.no_grad():
        other(torch.ones(1, 2))  # makes it
    right, found = opt.ema_state_dict(model), resumed.ema_state_dict(other)
    assert torch.equal(right["cache"], found["cache"])
    step(other, resumed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resized_buffer_is_followed(kind):
    model = Net()
    opt = make(model, kind)
    step(model, opt)
    model.mean = torch.full((5,), 3.0)
    step(model, opt)
    assert torch.equal(opt.ema_state_dict(model)["mean"], torch.full((5,), 4.0))
    with opt.ema_weights():
        assert model.mean.shape == (5,)
    step(model, opt)
    expected = 5.0 if kind == "teacher" else 4.5
    assert torch.equal(opt.ema_state_dict(model)["mean"], torch.full((5,), expected))
    if kind != "average":
        assert opt.teacher_for_test.mean.shape == (5,)


UNAVERAGED = {
    "int": torch.arange(3),
    "bool": torch.tensor([True, False]),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "sparse": torch.eye(3).to_sparse(),
    "quantized": twins.quantized(torch.ones(3)),
    "expanded": torch.ones(1).expand(3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNAVERAGED)
def test_what_cannot_be_averaged_is_copied(name, kind):
    model = Net()
    model.register_buffer("other", UNAVERAGED[name].detach())
    opt = make(model, kind)
    step(model, opt)
    model.other = UNAVERAGED[name].detach()
    step(model, opt)
    found = opt.ema_state_dict(model)["other"]
    assert found.dtype == UNAVERAGED[name].dtype
    shown = [t.dequantize() if t.is_quantized else t.to_dense() for t in (found, model.other)]
    assert torch.equal(*(t.float() for t in shown))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    with opt.ema_weights():
        pass
    step(model, opt)


@pytest.mark.parametrize("name", ["int", "float8", "quantized"])
def test_a_skipped_step_copies_nothing(name):
    model = Net()
    model.register_buffer("other", UNAVERAGED[name].clone())
    opt = make(model, "teacher")
    step(model, opt)
    model.other = UNAVERAGED[name][:1].clone().expand(model.other.shape).clone()
    opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    before = str(opt.teacher_for_test.other)
    step(model, opt)
    assert str(opt.teacher_for_test.other) == before


def test_the_number_of_averages_may_change():
    model = Net()
    opt = make(model)
    step(model, opt)
    opt.param_groups[0]["ema_decay"] = (0.5, 0.75)
    model.mean.fill_(7.0)
    step(model, opt)
    assert torch.equal(opt.ema_state_dict(model, 1)["mean"], torch.full((2,), 8.0))
    resumed = make(other := Net())
    with pytest.warns(UserWarning, match="ema_decay"):
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    step(other, resumed)


def test_copies_hold_their_own():
    model = Net()
    opt = make(model)
    step(model, opt)
    both = copy.deepcopy((model, opt))
    step(*both)
    assert torch.equal(opt.ema_state_dict(model)["mean"], torch.full((2,), 1.0))
    assert torch.equal(both[1].ema_state_dict(both[0])["mean"], torch.full((2,), 1.5))
    (entry,) = (e for e in both[1].state.values() if "ema_buffers" in e)
    assert torch.equal(entry["ema_buffers"]["0"]["mean"], torch.full((2,), 1.5))


def test_a_wrapped_model_takes_the_buffers_of_a_plain_one():
    model = Net()
    opt = make(model)
    step(model, opt)
    wrapped = nn.DataParallel(other := Net())
    resumed = FusedScaledSGD(
        other.parameters(), lr=0.1, ema_decay=0.5, model=wrapped, ema_buffers="average"
    )
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(resumed.ema_state_dict(other)["mean"], torch.full((2,), 1.0))


@pytest.mark.parametrize("kind", ["average", "averaging teacher"])
def test_a_complex_buffer_is_averaged(kind):
    model = Net()
    model.mean = torch.full((2,), 1.0 + 1.0j)
    step(model, opt := make(model, kind))
    model.mean.mul_(2.0j)
    expected = opt.ema_state_dict(model)["mean"].lerp(model.mean + 1.0, 0.5)
    step(model, opt)
    assert torch.equal(opt.ema_state_dict(model)["mean"], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_of_a_dtype_that_does_not_cast_is_refused(kind):
    model = Net()
    step(model, opt := make(model, kind))
    saved = copy.deepcopy(opt.state_dict())
    held = [e["ema_buffers"]["0"] for e in saved["state"].values() if "ema_buffers" in e]
    held[0]["mean"] = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"complex64; allowed: what casts"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("what", ["meta", "expanded"])
def test_nothing_is_copied_into_a_module_that_cannot_take_all(what):
    model = Net()
    step(model, opt := make(model))
    target = copy.deepcopy(model)
    target.mean = target.mean.to("meta") if what == "meta" else target.mean[:1].expand(2)
    before = [p.detach().clone().zero_() for p in target.parameters()]
    nn.utils.vector_to_parameters(torch.zeros(6), target.parameters())
    with pytest.raises(ValueError, match="allowed: tensors that can be written to"):
        opt.copy_ema_to(target)
    assert all(map(torch.equal, before, target.parameters()))

"""A read changes nothing: weights after ema_weights(), whatever happens inside and around it."""

from __future__ import annotations

import pytest
import torch
from swaps import Whole, assert_holds_average, trained
from torch import nn

from fused_ema import FusedScaledSGD


def cast_and_back(model):
    model.half()
    model.float()


def cast(model):
    model.half()


def move(model):
    model.to("meta")


def write(model):
    for p in model.parameters():
        if p.requires_grad:
            p.data.fill_(7.0)
    with torch.no_grad():
        model.first.weight.mul_(2.0)


def train(model):
    model(torch.randn(8, 3))


def replace_buffers(model):
    model.seen = model.seen + 1.0
    model.norm.running_mean = torch.ones(7)
    del model.norm.num_batches_tracked


def replace_parameters(model):
    model.first.weight = nn.Parameter(torch.zeros(4, 3))
    model.last.bias = None


def resize(model):
    model.first.weight.data = torch.zeros(2)


def swap_tensors(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.half()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def overwrite(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.half()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize(
    "happens",
    [
        cast_and_back,
        cast,
        move,
        write,
        train,
        replace_buffers,
        replace_parameters,
        resize,
        swap_tensors,
        overwrite,
    ],
)
@pytest.mark.parametrize("raises", [False, True])
def test_all_is_what_it_was_whatever_happens_inside(happens, raises):
    model, opt = trained()
    whole = Whole(model, opt)
    try:
        with opt.ema_weights():
            assert_holds_average(model, opt)
            happens(model)
            if raises:
                raise KeyError
    except KeyError:
        assert raises
    whole.check()
    opt.step()


def test_a_module_that_only_the_context_knows_is_kept():
    model, opt = trained(known=False)
    whole = Whole(model, opt)
    with opt.ema_weights(model=model):
        assert_holds_average(model, opt)
        train(model)
        model.half()
    whole.check()
    with (
        pytest.raises(ValueError, match="model holds none"),
        opt.ema_weights(model=nn.Linear(2, 2)),
    ):
        pass
    with pytest.raises(ValueError, match="model: received a dict"):
        opt.ema_weights(model={})
    whole.check()


@pytest.mark.parametrize("kwargs", [{"master_weights": True}, {"ema_format": "delta"}, {}])
def test_compact_and_master_averages(kwargs):
    model, opt = trained(dtype=torch.bfloat16, **kwargs)
    whole = Whole(model, opt)
    expected = {p: a.bfloat16() for p, a in opt._averages(0).items()}
    with opt.ema_weights():
        assert all(torch.equal(p, a) for p, a in expected.items())
        model.float()
    whole.check()


def test_averaged_buffers_are_held_and_left_as_they_were():
    model, opt = trained(ema_buffers="average")
    held = opt.ema_state_dict(model)["norm.running_mean"]
    before, mine = held.clone(), model.norm.running_mean.clone()
    whole = Whole(model, opt)
    with opt.ema_weights():
        assert torch.equal(model.norm.running_mean, before)
        assert not torch.equal(model.norm.running_mean, mine)
        train(model)
        model.half()
    whole.check()
    assert torch.equal(opt.ema_state_dict(model)["norm.running_mean"], before)


def test_parameters_and_buffers_without_plain_memory():
    base = torch.arange(12.0)
    model = nn.Module()
    model.left = nn.Parameter(base[:6].view(2, 3).t())
    model.right = nn.Parameter(base[3:9])  # shares memory with it
    model.register_buffer("wide", torch.ones(1, 3).expand(4, 3))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("flag", torch.tensor(True))
    opt = FusedScaledSGD([model.left], lr=1.0, ema_decay=0.5, model=model)
    model.left.grad = torch.ones(3, 2)
    opt.step()
    before = base.clone()
    with opt.ema_weights():
        assert not torch.equal(base, before)
        base[:9] = 0.0
        model.wide[0].data.fill_(3.0)
        model.sparse = torch.zeros(3, 3).to_sparse()
        model.flag.logical_not_()
    assert torch.equal(base, before)
    assert torch.equal(model.wide, torch.ones(4, 3))
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))
    assert model.flag.item()


def test_buffers_may_grow_inside_and_only_caches_stay_so():
    model, opt = trained()
    with opt.ema_weights():
        model.cache = torch.ones(5)
        model.seen.resize_(50).fill_(1.0)
    assert torch.equal(model.cache, torch.ones(5))
    assert torch.equal(model.seen, torch.zeros(2))


@pytest.mark.parametrize("size", [0, 4 * 8])
def test_values_come_back_into_new_memory_where_theirs_was_freed(size):
    model, opt = trained()
    weight, frozen = model.last.weight.detach().clone(), model.frozen.weight.detach().clone()
    with opt.ema_weights():
        model.last.weight.untyped_storage().resize_(0)
        model.last.weight.untyped_storage().resize_(size)
    assert torch.equal(model.last.weight, weight)
    context = opt.ema_weights()
    context.__enter__()
    model.frozen.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"frozen\.weight: its storage was resized"):
        context.__exit__(None, None, None)
    assert torch.equal(model.last.weight, weight)
    assert frozen.shape == model.frozen.weight.shape


def test_a_write_that_cannot_be_undone_is_told():
    model, opt = trained()
    whole = Whole(model, opt)
    context = opt.ema_weights()
    context.__enter__()
    model.frozen.bias.add_(1.0)
    model.half()
    with pytest.raises(RuntimeError, match=r"could not restore frozen\.bias: it was written"):
        context.__exit__(None, None, None)
    model.frozen.bias.data.copy_(whole.before["model frozen.bias"][4])
    whole.check(versions=False)
    opt.state_dict()


def test_new_gradients_of_the_users_stay():
    model, opt = trained()
    weight = model.first.weight
    with opt.ema_weights():
        opt.zero_grad()
        model(torch.randn(8, 3)).sum().backward()
        grad = weight.grad
    assert weight.grad is grad
    with opt.ema_weights():
        opt.zero_grad()
    assert weight.grad is None


def test_hooks_of_accumulated_gradients_outlive_a_cast():
    model, opt = trained()
    calls = []
    node = model.first.weight.expand_as(model.first.weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: calls.append(1))
    with opt.ema_weights():
        model.half()
    model(torch.randn(8, 3)).sum().backward()
    assert calls == [1]


def test_backward_passes_do_not_mix_weights_and_averages():
    model, opt = trained()
    weight = model.last.weight
    x = torch.randn(2, 4, requires_grad=True)
    expected = weight.detach().sum(0).expand(2, 4)
    outside = model.last(x).sum()
    with opt.ema_weights():
        inside = model.last(x).sum()
        model.last(x).sum().backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outside.backward(retain_graph=True)
    x.grad = None
    outside.backward()
    assert torch.equal(x.grad, expected)
    for _ in range(20):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            inside.backward(retain_graph=True)
        opt.step()
    with opt.ema_weights(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()


def test_weights_loaded_after_an_evaluation_are_where_training_starts():
    model = nn.Linear(3, 3, bias=False).bfloat16()
    opt = FusedScaledSGD(model.parameters(), lr=0.5, ema_decay=0.75, master_weights=True)
    with opt.ema_weights():
        model(torch.ones(1, 3).bfloat16())
    with torch.no_grad():
        model.weight.fill_(7.0)
    model.weight.grad = torch.ones(3, 3).bfloat16()
    opt.step()
    assert torch.equal(opt.state[model.weight]["master"], torch.full((3, 3), 6.5))
    assert torch.equal(opt.state[model.weight]["ema"], torch.full((3, 3), 7 * 0.75 + 6.5 * 0.25))


def test_masters_take_an_average_that_is_copied_into_their_weights():
    model, opt = trained(dtype=torch.bfloat16, master_weights=True)
    weight = model.last.weight
    average = opt.state[weight]["ema"].clone()
    opt.copy_ema_to(model)
    assert torch.equal(weight, average.bfloat16())
    assert torch.equal(opt.state[weight]["master"], average)
    opt.state[weight]["momentum_buffer"].zero_()
    weight.grad = torch.ones_like(weight)
    opt.step()
    assert torch.equal(opt.state[weight]["master"], average - 0.5)


def test_differences_stay_averages_when_their_weights_are_replaced():
    model, opt = trained(ema_format="delta", ema_decay=(0.5, 0.75), master_weights=True)
    with torch.no_grad():
        model.first.weight[0, 0] = 1.0  # a difference reaches no further than 64
    before = [{p: a.clone() for p, a in opt._averages(i).items()} for i in range(2)]
    opt.copy_ema_to(model)
    for i in range(2):
        for p, a in opt._averages(i).items():
            # float16 keeps 11 bits of the difference
            away = (before[i][p] - before[0][p]).abs() * 2.0**-11
            assert ((a - before[i][p]).abs() <= away + 1e-6).all()
    assert all(torch.equal(p, a) for p, a in before[0].items())

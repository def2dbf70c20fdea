"""ema_weights(), ema_state_dict() and copy_ema_to()."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fused_ema import FusedScaledAdamW, FusedScaledSGD


def trained(dtype: torch.dtype = torch.float32, **kwargs) -> tuple[nn.Module, FusedScaledAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)
    optimizer = FusedScaledAdamW(model.parameters(), lr=0.1, **{"ema_decay": 0.9, **kwargs})
    for _ in range(4):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    return model, optimizer


def snapshot(tensors) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def all_equal(tensors, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_and_averages_are_restored_bit_by_bit(dtype, backend):
    model, optimizer = trained(dtype, backend=backend)
    weights = snapshot(model.parameters())
    averages = snapshot(optimizer.state[p]["ema"] for p in model.parameters())
    with optimizer.ema_weights():
        inside = snapshot(model.parameters())
        assert all_equal(inside, [average.to(dtype) for average in averages])
        assert not all_equal(inside, weights)
    assert all_equal(model.parameters(), weights)
    assert all_equal([optimizer.state[p]["ema"] for p in model.parameters()], averages)


def test_restored_after_an_exception():
    model, optimizer = trained()
    weights = snapshot(model.parameters())
    with pytest.raises(KeyError), optimizer.ema_weights():
        raise KeyError
    assert all_equal(model.parameters(), weights)
    optimizer.step()


def test_non_contiguous_parameters_are_swapped():
    base = torch.arange(12.0).reshape(3, 4)
    param = nn.Parameter(base.t())
    optimizer = FusedScaledSGD([param], lr=1.0, ema_decay=0.5)
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = param.detach().clone()
    with optimizer.ema_weights():
        torch.testing.assert_close(param.detach(), before + 0.5)
    assert torch.equal(param, before)


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_is_the_callers(enabled):
    _, optimizer = trained()
    with torch.set_grad_enabled(enabled), optimizer.ema_weights():
        assert torch.is_grad_enabled() == enabled


def test_refuses_what_would_mix_weights_and_averages():
    model, optimizer = trained()
    with optimizer.ema_weights():
        for misuse in (
            optimizer.step,
            optimizer.state_dict,
            lambda: optimizer.load_state_dict({}),
            lambda: optimizer.ema_weights().__enter__(),
            lambda: optimizer.ema_state_dict(model),
            lambda: optimizer.copy_ema_to(model),
            lambda: copy.deepcopy(optimizer),
        ):
            with pytest.raises(RuntimeError, match=r"inside ema_weights\(\)"):
                misuse()


def test_state_dict_has_the_models_keys_and_shares_memory():
    model, optimizer = trained()
    result = optimizer.ema_state_dict(model)
    assert list(result) == list(model.state_dict())
    assert result["0.weight"].data_ptr() == optimizer.state[model[0].weight]["ema"].data_ptr()
    assert torch.equal(result["1.running_mean"], model[1].running_mean)
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(result)
    assert torch.equal(fresh[2].bias, optimizer.state[model[2].bias]["ema"])
    with pytest.raises(ValueError, match="none of the optimizer's averaged parameters"):
        optimizer.ema_state_dict(nn.Linear(5, 4))


def test_state_dict_with_tied_and_frozen_parameters():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    model["frozen"] = nn.Linear(2, 2)
    optimizer = FusedScaledSGD([model["a"].weight], lr=1.0, ema_decay=0.5)
    model["a"].weight.grad = torch.ones(2, 2)
    optimizer.step()
    result = optimizer.ema_state_dict(model)
    assert torch.equal(result["a.weight"], result["b.weight"])
    assert torch.equal(result["a.weight"], optimizer.state[model["a"].weight]["ema"])
    assert torch.equal(result["frozen.bias"], model["frozen"].bias)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_several_averages(index, backend):
    model, optimizer = trained(ema_decay=(0.0, 0.5, 1.0), backend=backend)
    average = optimizer.ema_state_dict(model, index)["2.weight"]
    values = average.clone()
    with optimizer.ema_weights(index):
        assert torch.equal(model[2].weight, values)
    key = ("ema", "ema_1", "ema_2")[index]
    assert average.data_ptr() == optimizer.state[model[2].weight][key].data_ptr()
    for wrong in (3, -1):
        with pytest.raises(IndexError, match="index="):
            optimizer.ema_state_dict(model, wrong)


def test_no_average_at_all():
    model, optimizer = trained(ema_decay=None)
    with pytest.raises(IndexError, match="made without ema_decay"):
        optimizer.ema_state_dict(model)


def test_copy_to_another_model_by_order_and_to_itself():
    model, optimizer = trained()
    other = copy.deepcopy(model).to(torch.bfloat16)
    optimizer.copy_ema_to(other, buffers=False)
    average = optimizer.state[model[0].weight]["ema"].clone()
    assert torch.equal(other[0].weight, average.bfloat16())
    optimizer.copy_ema_to(model)
    assert torch.equal(model[0].weight, average)
    with pytest.raises(ValueError, match="shape"):
        optimizer.copy_ema_to(nn.Sequential(nn.Linear(5, 3)))


def test_copy_pairs_by_name_with_several_groups():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    groups = [{"params": model[1].parameters()}, {"params": model[0].parameters()}]
    unnamed = FusedScaledSGD(groups, ema_decay=0.5)
    with pytest.raises(ValueError, match="pass model="):
        unnamed.copy_ema_to(copy.deepcopy(model))
    groups = [{"params": model[1].parameters()}, {"params": model[0].parameters()}]
    named = FusedScaledSGD(groups, ema_decay=0.5, model=model)
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    named.copy_ema_to(other)
    assert torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(other[1].weight, model[1].weight)


def test_buffers_that_are_left_do_not_mind_the_number_of_averages():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.5, model=model, ema_buffers="leave")
    opt.param_groups[0]["ema_decay"] = None
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert all("ema" not in state for state in opt.state.values())

"""load_ema() against the packages themselves, and against their layouts written by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign import (
    DIFFUSERS,
    EMA_PYTORCH,
    TIMM,
    TORCH,
    UPDATES,
    assert_averages,
    network,
    per_package,
    prefixed,
    saved_by,
    written_by_hand,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fused_ema import FusedScaledAdamW, FusedScaledSGD, load_ema


def snapshot(opt, model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in (*opt.ema_state_dict(model).values(), *model.buffers())]


@pytest.mark.parametrize("state_of", [written_by_hand, saved_by])
@per_package
def test_loads_the_average_and_nothing_else(package, state_of):
    model, source = network(), network(seed=1)
    opt = FusedScaledAdamW(model.parameters(), ema_decay=0.9, model=model)
    before = copy.deepcopy(model.state_dict())
    found = load_ema(opt, model, state_of(package, source))
    assert_averages(opt, model, source)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    counts = package != TIMM
    assert found.updates == (UPDATES if counts else None)
    assert opt.param_groups[0]["base_steps"] == (UPDATES if counts else 0.0)
    buffers = () if package == DIFFUSERS else tuple(dict(source.named_buffers()))
    assert set(found.unused) == set(buffers)


@per_package
def test_layouts_written_by_hand_are_the_packages(package):
    by_hand, real = (of(package, network(seed=1)) for of in (written_by_hand, saved_by))
    assert by_hand.keys() == real.keys()
    for key, value in real.items():
        torch.testing.assert_close(by_hand[key], value, rtol=0, atol=0)


@per_package
def test_held_buffers_are_loaded(package):
    model, source = network(), network(seed=1)
    source(torch.randn(4, 8))
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.9, model=model, ema_buffers="average")
    found = load_ema(opt, model, written_by_hand(package, source))
    assert found.unused == ()
    kept = model if package == DIFFUSERS else source
    average = opt.ema_state_dict(model)
    for name, expected in kept.named_buffers():
        assert torch.equal(average[name], expected), name
    assert torch.equal(model[1].running_mean, torch.zeros(16))


@per_package
def test_a_teacher_stays_the_average(package):
    model, teacher, source = network(), network(), network(seed=1)
    teacher.requires_grad_(False)
    opt = FusedScaledSGD(model.parameters(), lr=0.0, ema_decay=1.0, teacher=teacher, model=model)
    load_ema(opt, model, written_by_hand(package, source))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
    for found, expected in zip(teacher.parameters(), source.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_averages_of_half_parameters_stay_float32():
    model, source = network(torch.bfloat16), network(seed=1)
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.9)
    load_ema(opt, model, source.state_dict())
    assert opt.state[model[0].weight]["ema"].dtype == torch.float32
    assert_averages(opt, model, source)
    half = network(torch.bfloat16, seed=2)
    load_ema(opt, model, half.state_dict())
    assert_averages(opt, model, half)


@pytest.mark.parametrize("form", ["bf16", "delta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_averages_in_16_bits(dtype, form):
    model, source = network().to(dtype), network(seed=1)
    options = {"ema_decay": (0.9, 0.5), "ema_format": form, "master_weights": True}
    opt = FusedScaledAdamW(model.parameters(), **options)
    other = copy.deepcopy(opt.ema_state_dict(model))
    load_ema(opt, model, source.state_dict(), index=1)
    found = opt.ema_state_dict(model, index=1)
    # bfloat16 has 8 bits; a difference 11, below 1 to 2**-11
    rtol, atol = (2.0**-8, 0.0) if form == "bf16" else (0.0, 2.0**-11)
    for name, param in source.named_parameters():
        assert opt.state[dict(model.named_parameters())[name]]["ema_1"].element_size() == 2
        torch.testing.assert_close(found[name].float(), param.detach(), rtol=rtol, atol=atol)
    for name, value in opt.ema_state_dict(model).items():
        assert torch.equal(value, other[name]), name


def test_a_difference_beyond_the_format_changes_nothing():
    model = network()
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.9, ema_format="delta")
    state = {name: value + 0.5 for name, value in model.state_dict().items()}
    name = next(reversed(dict(model.named_parameters())))
    state[name] = state[name] + 64.0
    before = snapshot(opt, model)
    with pytest.raises(ValueError, match=rf"{name}' is up to 64.5 from the weights; allowed: 64"):
        load_ema(opt, model, state)
    assert all(map(torch.equal, before, snapshot(opt, model)))


def test_one_of_several_averages():
    model, source = network(), network(seed=1)
    opt = FusedScaledSGD(model.parameters(), ema_decay=(0.9, 0.99))
    load_ema(opt, model, source.state_dict(), index=1)
    assert_averages(opt, model, source, index=1)
    assert_averages(opt, model, model, index=0)
    with pytest.raises(IndexError, match="index=2"):
        load_ema(opt, model, source.state_dict(), index=2)


def test_a_part_of_what_is_optimized():
    models, source = nn.ModuleList([network(), network(seed=3)]), network(seed=1)
    opt = FusedScaledSGD(models.parameters(), ema_decay=0.9)
    load_ema(opt, models[1], written_by_hand(DIFFUSERS, source))
    assert_averages(opt, models[1], source)
    assert_averages(opt, models[0], models[0])


def test_diffusers_tensors_of_tied_parameters():
    class Tied(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.a, self.b, self.c = (nn.Linear(2, 2, bias=False) for _ in range(3))
            self.b.weight = self.a.weight

    model, source = Tied(0), Tied(1)
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.9)
    load_ema(opt, model, written_by_hand(DIFFUSERS, source))
    assert_averages(opt, model, source)


def test_diffusers_tensors_of_the_trained_parameters():
    model, source = network(), network(seed=1)
    for net in (model, source):
        net[3].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = FusedScaledSGD(trained, ema_decay=0.9)
    state = written_by_hand(DIFFUSERS, source)
    state["shadow_params"] = state["shadow_params"][: len(trained)]
    load_ema(opt, model, state)
    assert_averages(opt, model[0], source[0])
    assert_averages(opt, model[1], source[1])


def test_wrappers_whose_own_name_is_a_prefix():
    def wrapped(seed: int) -> nn.Module:
        outer = nn.Module()
        outer.module = network(seed=seed)
        outer.register_buffer("scale", torch.tensor(float(seed)))
        return outer

    model, source = wrapped(0), wrapped(1)
    for package in (TORCH, DIFFUSERS):
        opt = FusedScaledSGD(model.parameters(), ema_decay=0.9, model=model, ema_buffers="average")
        load_ema(opt, model, written_by_hand(package, source))
        assert_averages(opt, model, source)


prefixes = st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=3).map("".join)


@given(prefixes)
def test_wrappers_of_the_state_do_not_matter(prefix):
    model, source = network(), network(seed=1)
    for state in (
        prefixed(prefix, source.state_dict()),
        {"n_averaged": 3, **prefixed("module." + prefix, source.state_dict())},
    ):
        opt = FusedScaledSGD(model.parameters(), ema_decay=0.9)
        load_ema(opt, model, state)
        assert_averages(opt, model, source)


@per_package
def test_a_wrapped_model(package):
    model, source = network(), network(seed=1)
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.9)
    for state in (source.state_dict(), written_by_hand(package, source)):
        load_ema(opt, nn.ModuleDict({"module": model}), state)
        assert_averages(opt, model, source)
        load_ema(opt, model, network(seed=2).state_dict())


def test_schedules_go_on_from_the_updates():
    model, seen = network(), []

    def decay(t):
        seen.append(float(t))
        return 0.9

    opt = FusedScaledSGD(model.parameters(), ema_decay=decay, kappa=2)
    load_ema(opt, model, written_by_hand(TORCH, model))
    opt.step()
    opt.step()
    assert seen == [UPDATES + 0.5, UPDATES + 2.5]  # the middle of two base steps


def test_a_count_on_the_device_stays_the_tensor_that_it_is():
    model = network()
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.9, capturable=True, backend="triton")
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    opt.step()
    counted = opt.param_groups[0]["base_steps"]
    load_ema(opt, model, written_by_hand(TORCH, model))
    assert opt.param_groups[0]["base_steps"] is counted
    assert counted.item() == UPDATES


def changed(package: str, **entries) -> dict:
    return {**written_by_hand(package, network(seed=1)), **entries}


def without(package: str, *keys: str) -> dict:
    state = written_by_hand(package, network(seed=1))
    return {key: value for key, value in state.items() if key not in keys}


WRONG = {
    "missing": (without(TORCH, "module.3.bias"), "'3.bias' is missing"),
    "missing buffer": (without(TORCH, "module.1.running_var"), "'1.running_var' is missing"),
    "unknown": (changed(TORCH, **{"module.4.bias": torch.ones(1)}), "'4.bias' is not in the model"),
    "shape": (changed(TORCH, **{"module.3.weight": torch.ones(2, 16)}), r"'3.weight' .*\(2, 16\)"),
    "broadcast": (changed(TORCH, **{"module.3.weight": torch.ones(16)}), r"'3.weight' .*\(16,\)"),
    "dtype": (changed(TORCH, **{"module.3.bias": torch.ones(1) * 1j}), r"'3.bias' .*complex64"),
    "type": (changed(TORCH, **{"module.3.bias": [1.0]}), "'3.bias' is a list"),
    "count": (changed(TORCH, n_averaged=torch.tensor(-1)), "'n_averaged' is -1"),
    "no count": (changed(EMA_PYTORCH, step=torch.zeros(2)), "'step' is tensor"),
    "fraction": (changed(DIFFUSERS, optimization_step=0.5), "'optimization_step' is 0.5"),
    "infinity": (changed(DIFFUSERS, optimization_step=torch.inf), "'optimization_step' is inf"),
    "too few": (changed(DIFFUSERS, shadow_params=[torch.ones(16, 8)]), "holds 1 tensors; .* 5"),
    "no average": ({"initted": True, "step": 3}, "'0.weight' is missing"),
    "a checkpoint": ({"state_dict_ema": {}}, "'state_dict_ema' is not in the model"),
    "a module": (network(), "received a Sequential"),
}


@pytest.mark.parametrize(("state", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_changes_nothing(state, message):
    model = network()
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.9, model=model, ema_buffers="average")
    before = snapshot(opt, model)
    with pytest.raises(ValueError, match=f"^state: .*{message}"):
        load_ema(opt, model, state)
    assert all(map(torch.equal, snapshot(opt, model), before))
    assert opt.param_groups[0]["base_steps"] == 0.0


def test_refused_inside_ema_weights_and_for_another_model():
    model = network()
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.9)
    with opt.ema_weights(), pytest.raises(RuntimeError, match=r"inside ema_weights\(\)"):
        load_ema(opt, model, model.state_dict())
    with pytest.raises(ValueError, match="none of the optimizer's averaged parameters"):
        load_ema(opt, network(), model.state_dict())


def test_what_was_exported_loads_again():
    model = network()
    opt = FusedScaledSGD(model.parameters(), lr=0.1, ema_decay=0.5)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
    exported = copy.deepcopy(opt.ema_state_dict(model))
    twin = FusedScaledSGD(model.parameters(), ema_decay=0.5)
    load_ema(twin, model, exported)
    torch.testing.assert_close(twin.ema_state_dict(model), exported, rtol=0, atol=0)

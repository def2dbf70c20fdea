"""Whatever a user replaces between two steps, no plan writes to the old thing."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from cases import DEVICE_BACKENDS
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from fused_ema import FusedScaledAdamW, FusedScaledSGD
from fused_ema.optim.stepping import Begun

STATES = ("exp_avg", "exp_avg_sq", "ema")


def parameters(shapes=((3, 4), (5,), ()), dtype=torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give_gradients(params, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def make(params, backend: str, **kwargs) -> FusedScaledAdamW:
    return FusedScaledAdamW(params, lr=0.1, ema_decay=0.9, backend=backend, **kwargs)


def assert_alike(params, optimizer, others, reference) -> None:
    """Parameters and averages agree with an optimizer that saw no replacement."""
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), q.detach().to(p.dtype), rtol=1e-6, atol=1e-6)
        for key in STATES:
            expected = reference.state[q][key].to(optimizer.state[p][key].dtype)
            torch.testing.assert_close(optimizer.state[p][key], expected, rtol=1e-6, atol=1e-6)


def run_with(backend: str, replace, shapes=((3, 4), (5,), ()), prepare=lambda params: None):
    """Two steps with `replace(params, optimizer)` between them, beside two plain ones."""
    params, others = parameters(shapes), parameters(shapes)
    prepare(params)
    optimizer, reference = make(params, backend), make(others, "reference")
    for p, q in ((params, optimizer), (others, reference)):
        give_gradients(p, seed=1)
        q.step()
    before = [p.detach() for p in params]
    replace(params, optimizer)
    values = [tensor.clone() for tensor in before]
    for p, q in ((optimizer.param_groups[0]["params"], optimizer), (others, reference)):
        give_gradients(p, seed=2)
        q.step()
    assert_alike(optimizer.param_groups[0]["params"], optimizer, others, reference)
    return before, values


def test_data_is_replaced(backend):
    def replace(params, _):
        for p in params:
            p.data = p.data.clone()

    before, values = run_with(backend, replace)
    for tensor, value in zip(before, values, strict=True):
        assert torch.equal(tensor, value)


def test_parameters_move_to_another_memory_order(backend):
    def replace(params, _):
        params[0].data = params[0].data.to(memory_format=torch.channels_last)

    run_with(backend, replace, shapes=((2, 3, 4, 5), (3,)))


def test_channels_last_stays_native():
    params = parameters(((2, 3, 4, 5),))
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    optimizer = make(params, "auto")
    give_gradients(params)
    optimizer.step()
    params[0].data = params[0].data.contiguous()
    optimizer.step()
    assert optimizer.backends == ("native",)
    assert optimizer.state[params[0]]["exp_avg"].is_contiguous()


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


def test_a_shrunken_state_is_refused():
    params = parameters()
    optimizer = make(params, "native")
    give_gradients(params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.state[params[1]]["exp_avg"].data = torch.zeros(2)
    with pytest.raises(RuntimeError, match=r"'exp_avg' has shape \(2,\), its parameter \(5,\)"):
        optimizer.step()
    assert all(torch.equal(p, value) for p, value in zip(params, before, strict=True))


@pytest.mark.parametrize("replacement", [torch.zeros(0, dtype=torch.float64), torch.zeros(3)])
def test_a_step_counter_of_the_wrong_size_is_refused(replacement, backend):
    params = parameters()
    optimizer = make(params, backend)
    give_gradients(params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.state[params[1]]["step"] = replacement
    with pytest.raises(RuntimeError, match="'step' has shape"):
        optimizer.step()
    assert all(torch.equal(p, value) for p, value in zip(params, before, strict=True))


def test_a_step_counters_data_is_replaced(backend):
    def replace(params, optimizer):
        for p in params:
            optimizer.state[p]["step"].data = optimizer.state[p]["step"].data.float()

    run_with(backend, replace)


@pytest.mark.parametrize("key", STATES)
def test_a_channels_last_states_data_is_laid_out_otherwise(key, backend):
    shape = (2, 3, 4, 5)

    def prepare(params):
        params[0].data = params[0].data.to(memory_format=torch.channels_last)

    def replace(params, optimizer):
        state = optimizer.state[params[0]][key]
        state.data = state.data.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
        assert not state.is_contiguous()

    run_with(backend, replace, shapes=(shape,), prepare=prepare)


def test_a_state_that_repeats_itself_is_never_overrun():
    weight = nn.Parameter(torch.ones(2, 8, 4, 4).to(memory_format=torch.channels_last))
    optimizer = make([weight], "native")
    give_gradients([weight])
    optimizer.step()
    optimizer.state[weight]["ema"].data = torch.zeros(1).expand(2, 8, 4, 4)
    give_gradients([weight])
    optimizer.step()
    assert optimizer.state[weight]["ema"].stride() == weight.stride()


def test_state_is_made_under_inference_mode_and_other_default_devices(backend):
    weight = nn.Parameter(torch.ones(3))
    optimizer = make([weight], backend)
    with torch.inference_mode(), optimizer.ema_weights():
        pass
    weight.grad = torch.ones(3)
    with torch.device("meta"):
        optimizer.step()
    assert optimizer.state[weight]["step"].item() == 1.0
    assert not optimizer.state[weight]["ema"].is_inference()


def test_lazily_negated_and_conjugated_parameters_are_refused(backend):
    conjugated = torch.randn(3, dtype=torch.complex64).conj()
    for tensor in (conjugated, conjugated.imag):
        optimizer = make([tensor], "auto" if backend == "native" else backend)
        with pytest.raises(TypeError, match="lazily conjugated or negated view"):
            optimizer.step()


def test_tensor_subclasses_do_not_reach_the_native_loop():
    plain = nn.Parameter(torch.ones(4))
    params = [nn.Parameter(TwoTensor(torch.ones(4), torch.ones(4))), plain]
    optimizer = make(params, "auto")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert sorted(optimizer.backends) == ["foreach", "native"]
    torch.testing.assert_close(params[0].a, plain.detach())
    with pytest.raises(RuntimeError, match=r"native: .*tensor subclasses"):
        make(params, "native").step()


@pytest.mark.parametrize("engine", ["auto", "foreach", "reference"])
@pytest.mark.parametrize("size", [1.0, 1e25])  # squares overflow
def test_tensor_subclasses_count_in_the_norm_that_all_are_clipped_to(size, engine):
    def clipped(wrap):
        params = [nn.Parameter(wrap(torch.ones(4))), nn.Parameter(torch.ones(4))]
        optimizer = FusedScaledSGD(params, lr=1.0, max_grad_norm=1.0, backend=engine)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p) * size
            optimizer.step()
        return optimizer.grad_norm.item(), params

    norm, (wrapped, plain) = clipped(lambda tensor: TwoTensor(tensor, tensor.clone()))
    expected, params = clipped(lambda tensor: tensor)
    assert norm == expected
    assert norm == pytest.approx(size * 8**0.5)
    assert isinstance(wrapped.data, TwoTensor)
    for found, right in zip(
        (wrapped.a, wrapped.b, plain), params[:1] * 2 + params[1:], strict=True
    ):
        torch.testing.assert_close(found, right.detach())


def test_storage_is_replaced_under_the_same_tensor(backend):
    def replace(params, _):
        for p in params:
            p.detach().share_memory_()

    run_with(backend, replace)


@pytest.mark.parametrize("of", ["param", "grad", *STATES])
def test_a_storage_that_is_too_small_is_refused(of):
    params = parameters()
    optimizer = make(params, "native")
    give_gradients(params)
    optimizer.step()
    weight = params[1]
    tensors = {"param": weight, "grad": weight.grad, **optimizer.state[weight]}
    tensors[of].untyped_storage().resize_(4)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"shape \[5\] has a storage that is too small"):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert optimizer.state[params[0]]["step"].item() == 1.0


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


def test_gradients_with_other_strides(backend):
    shape = (4, 3, 2, 5)
    plain, strided = parameters((shape,)), parameters((shape,))
    reference, optimizer = make(plain, "reference"), make(strided, backend)
    give_gradients(plain)
    strided[0].grad = plain[0].grad.to(memory_format=torch.channels_last)
    kept = strided[0].grad.clone()
    reference.step()
    optimizer.step()
    assert_alike(strided, optimizer, plain, reference)
    assert torch.equal(strided[0].grad, kept)
    expanded = torch.ones(1, 1, 1, 5)
    plain[0].grad, strided[0].grad = expanded.expand(shape).clone(), expanded.expand(shape)
    reference.step()
    optimizer.step()
    assert_alike(strided, optimizer, plain, reference)


def test_views_with_gaps_go_to_foreach_or_are_refused():
    base = torch.arange(24.0)
    params = [nn.Parameter(base[::2]), nn.Parameter(torch.ones(3))]
    optimizer = make(params, "auto")
    give_gradients(params)
    optimizer.step()
    assert sorted(optimizer.backends) == ["foreach", "native"]
    assert torch.equal(base[1::2], torch.arange(24.0)[1::2])
    refused = make(params, "native")
    with pytest.raises(RuntimeError, match="native: memory with gaps"):
        refused.step()


def test_views_that_come_to_be_dense_go_to_the_kernels():
    params = [nn.Parameter(torch.ones(4, 6)[:, ::2]), nn.Parameter(torch.ones(3))]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    opt, twin = make(params, "auto"), make(others, "reference")
    for seed in range(4):
        if seed == 2:
            params[0].data = params[0].data.contiguous()
        for ps, each in ((params, opt), (others, twin)):
            give_gradients(ps, seed)
            each.step()
        assert set(opt.backends) == ({"native", "foreach"} if seed < 2 else {"native"})
    assert_alike(params, opt, others, twin)


def test_complex_parameters(backend):
    torch.manual_seed(0)
    weight = torch.randn(5, 2)
    ours = nn.Parameter(torch.view_as_complex(weight.clone()))
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = make([ours], "auto" if backend in ("native", *DEVICE_BACKENDS) else backend)
    reference = torch.optim.AdamW([theirs], lr=0.1, foreach=False)
    for _ in range(3):
        ours.grad = torch.randn(5, dtype=torch.complex64)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert optimizer.state[ours]["ema"].dtype == torch.complex64


def test_two_dtypes_in_one_group_and_fifty_groups(backend):
    params = [
        nn.Parameter(torch.ones(3 + i % 4, dtype=(torch.float32, torch.bfloat16)[i % 2]))
        for i in range(50)
    ]
    groups = [{"params": [p], "lr": 2.0**-i, "ema_decay": 0.0} for i, p in enumerate(params)]
    optimizer = FusedScaledSGD(groups, lr=1.0, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.backends == (backend, backend)
    for i, p in enumerate(params):
        expected = torch.full_like(p, 1.0).sub_(2.0**-i)
        assert torch.equal(p, expected), i
        assert torch.equal(optimizer.state[p]["ema"], expected.float()), i


def test_sparse_gradients_are_refused_before_anything_moves(backend):
    embedding = nn.Embedding(5, 2, sparse=True)
    other = nn.Parameter(torch.ones(2))
    optimizer = make([other, embedding.weight], backend)
    embedding(torch.tensor([1])).sum().backward()
    other.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        optimizer.step()
    assert torch.equal(other, torch.ones(2))
    assert not optimizer.state_dict()["state"]


def test_autograd_notices_the_step(backend):
    weight = nn.Parameter(torch.ones(3))
    optimizer = make([weight], backend)
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nan_and_inf_propagate_as_in_torch(backend):
    ours = nn.Parameter(torch.ones(4))
    theirs = nn.Parameter(torch.ones(4))
    optimizer = make([ours], backend)
    reference = torch.optim.AdamW([theirs], lr=0.1, foreach=False)
    for p in (ours, theirs):
        p.grad = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    optimizer.step()
    reference.step()
    torch.testing.assert_close(ours, theirs, equal_nan=True)


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

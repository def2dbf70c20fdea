"""Tensors that lie, or are, otherwise than planned: other strides, sizes, kinds and values."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE_BACKENDS
from planned import STATES, assert_alike, give_gradients, make, parameters, run_with
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from fused_ema import FusedScaledSGD


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

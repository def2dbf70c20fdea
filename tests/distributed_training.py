"""Steps of sharded and replicated parameters, and the norm of their gradients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_case import (
    BACKENDS,
    MAX_NORM,
    SHARED,
    WORLD,
    assert_close,
    assert_equal_on_all_ranks,
    assert_same_training,
    batch,
    grid,
    line,
    make_model,
    mine,
    optimizer,
    shard,
    train,
    whole,
)
from optimizers import OPTIMIZERS, SHARDABLE
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fused_ema


def ddp_is_training_on_the_joined_batch(tmp_path: Path) -> None:
    for name in OPTIMIZERS:
        model, other = make_model(), make_model()
        opt, twin = optimizer(name, model), optimizer(name, other)
        norms = train(nn.parallel.DistributedDataParallel(model), opt, range(5), mine)
        assert_close(norms, train(other, twin, range(5), torch.clone))
        assert_same_training(model, opt, other, twin)
        states = [value for state in opt.state.values() for value in state.values()]
        assert_equal_on_all_ranks([*model.parameters(), *states])


def ddp_rounds_averages_alike(tmp_path: Path) -> None:
    """Random bits are the same in every process."""
    for ema_format in ("bf16", "delta"):
        model = make_model().float()
        opt = optimizer("AdamW", model, ema_format=ema_format)
        own = [tuple(tensor.float() for tensor in map(mine, batch(step))) for step in range(5)]
        parallel = nn.parallel.DistributedDataParallel(model)
        for x, y in own:
            opt.zero_grad()
            (parallel(x) - y).square().mean().backward()
            opt.step()
        averages = [state[key] for state in opt.state.values() for key in ("ema", "ema_1")]
        assert all(average.element_size() == 2 for average in averages)
        assert_equal_on_all_ranks([average.view(torch.int16).int() for average in averages])


def fsdp_is_training_on_the_joined_batch(tmp_path: Path) -> None:
    """With one norm over all shards, counted once where a mesh dimension repeats them."""
    meshes = [line(), grid(2, 1), grid(1, 2)]
    for name in SHARDABLE:
        other = make_model()
        twin = optimizer(name, other)
        expected = train(other, twin, range(5), torch.clone)
        assert min(expected) < MAX_NORM < max(expected)
        for mesh in meshes:
            for backend in BACKENDS:
                model = shard(make_model(), mesh)
                opt = optimizer(name, model, backend=backend)
                assert_close(train(model, opt, range(5), mine), expected)
                assert opt.backends == (backend,)
                assert_same_training(model, opt, other, twin)


def fsdp_takes_the_fused_backend_by_itself(tmp_path: Path) -> None:
    model = shard(make_model(), line())
    opt = optimizer("AdamW", model)
    train(model, opt, range(2), mine)
    assert opt.backends == ("native",)
    numels = [p.to_local().numel() for p in model.parameters()]
    assert numels == ([8, 2, 3, 1], [4, 1, 0, 0])[dist.get_rank()]
    assert all(p._local_tensor.grad is None for p in model.parameters())


def mixed_parameters() -> list[nn.Parameter]:
    """Plain; in shards; repeated; in shards of another mesh: one optimizer's."""
    generator = torch.Generator().manual_seed(1)
    ranks = line()
    places = [
        None,
        (ranks, [Shard(0)]),
        (ranks, [Replicate()]),
        (grid(1, 2), [Replicate(), Shard(1)]),
    ]
    values = [torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in places]
    return [
        nn.Parameter(value if place is None else distribute_tensor(value, *place))
        for value, place in zip(values, places, strict=True)
    ]


def set_gradients(params: Sequence[nn.Parameter]) -> list[Tensor]:
    """The same for all kinds; returns the whole ones."""
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
        if isinstance(param, DTensor):
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
    return grads


def plain_and_sharded_parameters_have_one_norm(tmp_path: Path) -> None:
    params = mixed_parameters()
    others = [nn.Parameter(whole(p.detach()).clone()) for p in params]
    opt, twin = (
        fused_ema.FusedScaledAdamW(ps, ema_decay=0.9, max_grad_norm=1.0) for ps in (params, others)
    )
    for _ in range(2):
        for q, grad in zip(others, set_gradients(params), strict=True):
            q.grad = grad
        opt.step()
        twin.step()
        assert_close(float(opt.grad_norm), float(twin.grad_norm))
        assert_equal_on_all_ranks([opt.grad_norm])
    assert set(opt.backends) == {"native"}
    for p, q in zip(params, others, strict=True):
        assert_close(whole(p.detach()), q.detach())
        assert_close(whole(opt.state[p]["ema"]), twin.state[q]["ema"])


def norm_of_gradients_that_only_one_process_has(tmp_path: Path) -> None:
    value = torch.ones(3, 4, dtype=torch.float64)
    param = nn.Parameter(distribute_tensor(value, line(), [Shard(0)]))
    opt = fused_ema.FusedScaledSGD([param], lr=0.1, max_grad_norm=1.0)
    if dist.get_rank() == 0:
        param.grad = torch.ones_like(param)
    opt.step()
    assert_close(float(opt.grad_norm), 8.0**0.5)


def gradients_placed_otherwise_are_redistributed(tmp_path: Path) -> None:
    for placements in ([Replicate()], [Partial()], [Shard(1)]):
        value = torch.ones(3, 4, dtype=torch.float64)
        param = nn.Parameter(distribute_tensor(value, line(), [Shard(0)]))
        opt = fused_ema.FusedScaledSGD([param], lr=1.0, max_grad_norm=100.0)
        grad = torch.arange(12, dtype=torch.float64).view(3, 4)
        param.grad = distribute_tensor(grad, line(), placements)
        assert_close(whole(param.grad), grad)
        opt.step()
        assert_close(float(opt.grad_norm), float(grad.norm()))
        assert_close(whole(param.detach()), value - grad)


def what_does_not_fit_is_refused(tmp_path: Path) -> None:
    value = torch.ones(3, 4, dtype=torch.float64)
    partial = nn.Parameter(DTensor.from_local(value, line(), [Partial()]))
    partial.grad = torch.zeros_like(partial)
    opt = fused_ema.FusedScaledSGD([partial], lr=1.0)
    with pytest.raises(RuntimeError, match="allowed: Shard and Replicate"):
        opt.step()

    param = nn.Parameter(distribute_tensor(value, line(), [Shard(0)]))
    opt = fused_ema.FusedScaledSGD([param], lr=1.0)
    param.grad = distribute_tensor(value, grid(1, 2), [Shard(0), Shard(0)])
    with pytest.raises(RuntimeError, match="grad does not match its parameter"):
        opt.step()
    opt = fused_ema.FusedScaledSGD([param], lr=1.0, differentiable=True)
    with pytest.raises(RuntimeError, match="differentiable=True with DTensor parameters"):
        opt.step()
    assert_close(whole(param.detach()), value)


def replaced_local_tensors_are_seen(tmp_path: Path) -> None:
    """As FSDP2 replaces them when it pads a loaded parameter; autograd is told of the writes."""
    for place in ("param", "ema"):
        param = nn.Parameter(
            distribute_tensor(torch.ones(3, 4, dtype=torch.float64), line(), [Shard(0)])
        )
        opt = fused_ema.FusedScaledSGD([param], lr=1.0, ema_decay=0.5)
        versions = [param._version]
        for _ in range(2):
            param.grad = torch.ones_like(param)
            opt.step()
            held = param if place == "param" else opt.state[param]["ema"]
            held._local_tensor = held._local_tensor.clone()
            versions.append(param._version)
        assert versions[0] < versions[1] < versions[2]
        assert_close(whole(param.detach()), torch.full((3, 4), -1.0, dtype=torch.float64))
        expected = torch.full((3, 4), -0.25, dtype=torch.float64)  # 1, 0.5, -0.25
        assert_close(whole(opt.state[param]["ema"]), expected)


def states_placed_otherwise_are_moved(tmp_path: Path) -> None:
    value = torch.ones(3, 4, dtype=torch.float64)
    for moved in (value.clone(), distribute_tensor(value, line(), [Replicate()])):
        param = nn.Parameter(distribute_tensor(value, line(), [Shard(0)]))
        opt = fused_ema.FusedScaledSGD([param], lr=1.0, ema_decay=0.5)
        opt.state[param]["ema"] = moved
        param.grad = torch.ones_like(param)
        opt.step()
        assert opt.state[param]["ema"].placements == param.placements
        assert_close(whole(opt.state[param]["ema"]), 0.5 * value)


def scaler_skips_for_all_if_one_process_overflows(tmp_path: Path) -> None:
    for name, fused in itertools.product(SHARDABLE, (None, True)):
        model, other = shard(make_model(), line()), make_model()
        opt, twin = optimizer(name, model, fused=fused), optimizer(name, other)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            x, y = map(mine, batch(step))
            opt.zero_grad()
            scaler.scale((model(x) - y).square().mean()).backward()
            if step == 1 and dist.get_rank() == 0:
                next(model.parameters()).grad.to_local()[0, 0] = torch.inf
            scaler.step(opt)
            scaler.update()
        assert scaler.get_scale() == 2.0
        train(other, twin, (0, 2, 3), torch.clone)
        assert_same_training(model, opt, other, twin)


def zero_with_fewer_parameters_than_processes(tmp_path: Path) -> None:
    """One process has nothing to step, and takes part in all that is done together."""

    class OneByOne(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 1, bias=False, dtype=torch.float64)
            nn.init.ones_(self.weight)

    model, other = OneByOne(), OneByOne()
    cls, fields = fused_ema.FusedScaledAdamW, {"weight_decay": 0.1}
    twin = cls(other.parameters(), **fields, **SHARED)
    parallel = nn.parallel.DistributedDataParallel(model)
    opt = ZeroRedundancyOptimizer(parallel.parameters(), cls, **fields, **SHARED)
    empty = not opt.optim.param_groups[0]["params"]
    both = [torch.zeros((), dtype=torch.int64) for _ in range(WORLD)]
    dist.all_gather(both, torch.tensor(int(empty)))
    assert sorted(map(int, both)) == [0, 1]
    for step in range(3):
        for net, one, part in ((parallel, opt, mine), (other, twin, torch.clone)):
            x, y = map(part, batch(step))
            one.zero_grad()
            (net(x) - y).square().mean().backward()
            one.step()
    assert_close(model.weight.detach(), other.weight.detach())
    assert_close(opt.optim.grad_norm, torch.zeros_like(twin.grad_norm) if empty else twin.grad_norm)
    with opt.optim.ema_weights(1):
        shown = model.weight.detach().clone()
    right = other if empty else twin.ema_state_dict(other, 1)
    assert_close(shown, right.weight.detach() if empty else right["weight"])
    opt.consolidate_state_dict(0)
    if dist.get_rank() == 0:
        saved = opt.state_dict()
        assert_close(saved["state"][0]["ema_1"], twin.state[other.weight]["ema_1"])


SCENARIOS = (
    ddp_is_training_on_the_joined_batch,
    ddp_rounds_averages_alike,
    fsdp_is_training_on_the_joined_batch,
    fsdp_takes_the_fused_backend_by_itself,
    plain_and_sharded_parameters_have_one_norm,
    norm_of_gradients_that_only_one_process_has,
    gradients_placed_otherwise_are_redistributed,
    what_does_not_fit_is_refused,
    replaced_local_tensors_are_seen,
    states_placed_otherwise_are_moved,
    scaler_skips_for_all_if_one_process_overflows,
    zero_with_fewer_parameters_than_processes,
)

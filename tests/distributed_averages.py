"""Averages of sharded parameters: swapped, read, and held by a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_case import (
    assert_close,
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
from optimizers import SHARDABLE
from torch.distributed.tensor import DTensor


def averages_are_evaluated_in_place_of_the_weights(tmp_path: Path) -> None:
    """Forward passes within and after see what the shards hold, also of the root."""
    x, _ = batch(100)
    for name in SHARDABLE:
        model, other = shard(make_model(), line()), make_model()
        opt, twin = optimizer(name, model, model=model), optimizer(name, other)
        train(model, opt, range(3), mine)
        train(other, twin, range(3), torch.clone)
        kept = [(t, whole(t).clone()) for s in opt.state.values() for t in (s["ema"], s["ema_1"])]
        with torch.no_grad():
            weights = model(x)
            assert_close(weights, other(x))
            for index in range(2):
                with opt.ema_weights(index), twin.ema_weights(index):
                    found = model(x)
                    assert_close(found, other(x))
                    assert not torch.allclose(found, weights)
                assert torch.equal(model(x), weights)
        assert all(torch.equal(whole(tensor), value) for tensor, value in kept)
        train(model, opt, range(3, 5), mine)
        train(other, twin, range(3, 5), torch.clone)
        assert_same_training(model, opt, other, twin)


def averages_are_read_as_a_state_dict(tmp_path: Path) -> None:
    model, other = shard(make_model(), line()), make_model()
    opt, twin = optimizer("AdamW", model, model=model), optimizer("AdamW", other, model=other)
    train(model, opt, range(3), mine)
    train(other, twin, range(3), torch.clone)
    with torch.no_grad():
        model(batch(0)[0])  # the root's parameters stay whole
    for index in range(2):
        found, expected = opt.ema_state_dict(model, index), twin.ema_state_dict(other, index)
        assert all(isinstance(value, DTensor) for value in found.values())
        assert_close({key: whole(value) for key, value in found.items()}, expected)

        plain, sharded = make_model(1), shard(make_model(1), line())
        with torch.no_grad():
            sharded(batch(0)[0])
        for target in (plain, sharded):
            opt.copy_ema_to(target, index)
            values = {key: whole(value) for key, value in target.state_dict().items()}
            assert_close(values, expected)
        assert_close(sharded(batch(0)[0]), plain(batch(0)[0]))


def averages_are_not_swapped_unless_the_module_is_known(tmp_path: Path) -> None:
    model = shard(make_model(), line())
    opt = optimizer("SGD", model)
    train(model, opt, range(1), mine)

    with (
        pytest.raises(RuntimeError, match="pass model=<the module>"),
        opt.ema_weights(),
    ):
        pass
    x, _ = batch(100)
    params = opt.param_groups[0]["params"]
    with torch.no_grad():
        weights = model(x)
        before = [(p.to_local().data_ptr(), p.to_local().clone()) for p in params]
        with opt.ema_weights(model=model):
            assert not torch.allclose(model(x), weights)
            for p in params:
                p.to_local().fill_(7.0)
        assert torch.equal(model(x), weights)
    for p, (address, value) in zip(params, before, strict=True):
        assert p.to_local().data_ptr() == address
        assert torch.equal(p.to_local(), value)
    context = opt.ema_weights(model=model)
    context.__enter__()
    weight = params[0]
    part, weight._local_tensor = weight._local_tensor, torch.zeros(3)
    with pytest.raises(RuntimeError, match="its local tensor was replaced"):
        context.__exit__(None, None, None)
    assert torch.equal(part, before[0][1])


def a_sharded_teacher_is_stepped_and_used(tmp_path: Path) -> None:
    """Its forward passes have no backward, after which FSDP2 would drop the root's full copies."""
    for name in SHARDABLE:
        model, other = shard(make_model(), line()), make_model()
        teacher, theirs = shard(make_model(1), line()), make_model(1)
        teacher(batch(0)[0])
        opt = optimizer(name, model, model=model, teacher=teacher)
        twin = optimizer(name, other, model=other, teacher=theirs)
        for step in range(4):
            with torch.no_grad():
                assert_close(teacher(batch(step)[0]), theirs(batch(step)[0]))
            train(model, opt, [step], mine)
            train(other, twin, [step], torch.clone)
        assert_same_training(model, opt, other, twin)
        for p, t in zip(model.parameters(), teacher.parameters(), strict=True):
            assert opt.state[p]["ema"] is t


def teachers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = shard(make_model(), line())
    teacher = shard(make_model(1), grid(1, 2))
    for wrong, text in (
        (make_model(1), "is whole in every process"),
        (teacher, "its parameter placed"),
        (list(shard(make_model(1), line()).parameters()), "without their module"),
    ):
        with pytest.raises(ValueError, match=text):
            optimizer("SGD", model, model=model, teacher=wrong)


SCENARIOS = (
    averages_are_evaluated_in_place_of_the_weights,
    averages_are_read_as_a_state_dict,
    averages_are_not_swapped_unless_the_module_is_known,
    a_sharded_teacher_is_stepped_and_used,
    teachers_that_do_not_fit_are_refused,
)

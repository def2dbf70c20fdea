"""State through torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_case import (
    assert_same_training,
    batch,
    line,
    make_model,
    mine,
    optimizer,
    shard,
    train,
)
from optimizers import SHARDABLE
from torch import nn
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.tensor import DTensor


def save(model: nn.Module, opt, path: Path, alone: bool = False) -> None:
    model_state, optim_state = dsd.get_state_dict(model, opt)
    dcp.save({"model": model_state, "optim": optim_state}, checkpoint_id=path, no_dist=alone)


def load(model: nn.Module, opt, path: Path, alone: bool = False) -> None:
    model_state, optim_state = dsd.get_state_dict(model, opt)
    state = {"model": model_state, "optim": optim_state}
    dcp.load(state, checkpoint_id=path, no_dist=alone)
    dsd.set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optim"])


def checkpoints_go_from_two_processes_to_one_and_back(tmp_path: Path) -> None:
    for name in SHARDABLE:
        other = make_model()
        twin = optimizer(name, other)
        train(other, twin, range(6), torch.clone)

        model = shard(make_model(), line())
        opt = optimizer(name, model)
        train(model, opt, range(2), mine)
        save(model, opt, tmp_path / f"{name}-2")
        if dist.get_rank() == 0:
            alone = make_model(1)
            its = optimizer(name, alone)
            load(alone, its, tmp_path / f"{name}-2", alone=True)
            train(alone, its, range(2, 4), torch.clone)
            save(alone, its, tmp_path / f"{name}-1", alone=True)
        dist.barrier()
        model = shard(make_model(2), line())
        opt = optimizer(name, model)
        load(model, opt, tmp_path / f"{name}-1")
        train(model, opt, range(4, 6), mine)
        assert_same_training(model, opt, other, twin)


def resuming_is_bit_exact(tmp_path: Path) -> None:
    for name in SHARDABLE:
        model = shard(make_model(), line())
        opt = optimizer(name, model)
        train(model, opt, range(3), mine)
        save(model, opt, tmp_path / f"{name}-exact")
        again = shard(make_model(1), line())
        resumed = optimizer(name, again)
        load(again, resumed, tmp_path / f"{name}-exact")
        for m, o in ((model, opt), (again, resumed)):
            train(m, o, range(3, 6), mine)
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local())
            for key, value in opt.state[p].items():
                found = resumed.state[q][key]
                assert type(found) is type(value)
                assert torch.equal(*(t.to_local() if key != "step" else t for t in (found, value)))


def with_teacher(seed: int):
    model, teacher = shard(make_model(), line()), shard(make_model(seed), line())
    return model, optimizer("AdamW", model, model=model, teacher=teacher), teacher


def a_teacher_is_loaded_in_place(tmp_path: Path) -> None:
    model, opt, teacher = with_teacher(1)
    train(model, opt, range(2), mine)
    save(model, opt, tmp_path / "teacher")
    again, resumed, loaded = with_teacher(2)
    load(again, resumed, tmp_path / "teacher")
    for p, t, other in zip(*(m.parameters() for m in (again, loaded, teacher)), strict=True):
        assert resumed.state[p]["ema"] is t
        assert torch.equal(t.to_local(), other.to_local())


def a_loaded_teacher_is_used_at_once(tmp_path: Path) -> None:
    model, opt, teacher = with_teacher(1)
    train(model, opt, range(2), mine)
    _, resumed, loaded = with_teacher(2)
    x, _ = batch(0)
    with torch.no_grad():
        before = loaded(x)
        resumed.load_state_dict(opt.state_dict())
        assert torch.equal(loaded(x), teacher(x))
        assert not torch.equal(loaded(x), before)


def a_whole_state_dict_is_distributed(tmp_path: Path) -> None:
    other = make_model()
    twin = optimizer("AdamW", other)
    train(other, twin, range(2), torch.clone)
    model = shard(copy.deepcopy(other), line())
    opt = optimizer("AdamW", model)
    opt.load_state_dict(twin.state_dict())
    train(model, opt, range(2, 4), mine)
    train(other, twin, range(2, 4), torch.clone)
    assert opt.backends == ("native",)
    assert_same_training(model, opt, other, twin)


def the_documented_example_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    example = example.replace("torch.distributed.init_process_group()\n", "")
    example = example.replace('"checkpoint"', repr(str(tmp_path / "example")))
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(example, "distributed.md", "exec"), names)
    opt = names["opt"]
    assert opt.backends == ("native",)
    assert opt.param_groups[0]["base_steps"] == 40.0
    for state in opt.state.values():
        assert isinstance(state["ema"], DTensor)
        assert float(state["step"]) == 40.0


SCENARIOS = (
    checkpoints_go_from_two_processes_to_one_and_back,
    resuming_is_bit_exact,
    a_teacher_is_loaded_in_place,
    a_loaded_teacher_is_used_at_once,
    a_whole_state_dict_is_distributed,
    the_documented_example_runs,
)

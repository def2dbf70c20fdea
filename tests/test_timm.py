"""timm's factory, tasks and checkpoints with the fused optimizers, by the calls of its train.py."""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections import OrderedDict

import pages
import pytest
import torch
from pages import one_thread  # noqa: F401
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    timm = pytest.importorskip("timm", minversion="1.0.27")
    task_module = pytest.importorskip("timm.task")
    from timm import utils
    from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs

from fused_ema import FusedEMA, FusedScaledAdamW, FusedScaledSGD

integration = importlib.import_module("fused_ema.integrations.timm")
FusedModelEma = integration.FusedModelEma

pytestmark = pytest.mark.filterwarnings("ignore")
DECAY = 0.7


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    parts = {
        "stem": nn.Linear(6, 8),
        "bn1": nn.BatchNorm1d(8),
        "act": nn.GELU(),
        "fc": nn.Linear(8, 3),
    }
    return nn.Sequential(OrderedDict(parts)).double()


def batches(count: int, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 8, 6, dtype=torch.float64, generator=generator)
    return [(x, x[:, 0].gt(0).long()) for x in images]


def arguments(**changed) -> argparse.Namespace:
    given = {"opt": "fusedadamw", "lr": 1e-2, "weight_decay": 0.05, "momentum": 0.9}
    return argparse.Namespace(**{**given, **changed})


def train(task, optimizer, data, *, clip_grad=None, accumulate: int = 1, scaler=None) -> None:
    """An epoch of timm's train.py."""
    optimizer.zero_grad()
    task.train()
    for i, (x, y) in enumerate(data):
        due = (i + 1) % accumulate == 0
        loss = task(x, y)["loss"] / accumulate
        parameters = None if clip_grad is None else task.get_clip_parameters()
        if scaler is not None:
            scaler(loss, optimizer, clip_grad=clip_grad, parameters=parameters, need_update=due)
        else:
            loss.backward()
            if due:
                if clip_grad is not None:
                    utils.dispatch_clip_grad(parameters, value=clip_grad)
                optimizer.step()
        if due:
            optimizer.zero_grad()
            task.update_ema(step=i + 1)


def task_of(model) -> task_module.ClassificationTask:
    return task_module.ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)


def assert_close(found, expected, **tolerances) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **tolerances)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_ratios_are_for_groups_with_decay_as_timms(name):
    given = optimizer_kwargs(arguments(opt=f"fused{name}"))
    opt = create_optimizer_v2(network(), **given)
    adapts = [(group["weight_decay"] != 0.0, group["adapt"]) for group in opt.param_groups]
    assert sorted(adapts) == [(False, False), (True, True)]
    own = integration.without_decay_alone(type(opt), network().parameters(), adapt=False, lr=0.1)
    assert [group["adapt"] for group in own.param_groups] == [False]


def test_the_factory_knows_every_optimizer():
    names = {f"fused{name}" for name in ("sgd", "adam", "adamw", "rmsprop", "lars", "lamb")}
    assert names <= set(list_optimizers("fused*"))
    opt = create_optimizer_v2(network(), **optimizer_kwargs(arguments(opt="fusedsgd")))
    assert type(opt) is FusedScaledSGD
    assert (opt.defaults["momentum"], opt.defaults["nesterov"]) == (0.9, True)
    given = arguments(opt_betas=[0.8, 0.9], opt_eps=1e-6)
    opt = create_optimizer_v2(network(), **optimizer_kwargs(given), ema_decay=DECAY, kappa=4)
    assert type(opt) is FusedScaledAdamW
    assert (opt.defaults["betas"], opt.defaults["eps"], opt.kappa) == ((0.8, 0.9), 1e-6, 4.0)


OPTIONS = {
    "plain": {},
    "layer decay": {"layer_decay": 0.75},
    "clipping": {"clip_grad": 0.5},
    "accumulation": {"accumulate": 2},
    "scaler": {"scaler": True, "clip_grad": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_average_as_timms_own(options):
    """Rounding is of order 1e-16; the learning rate moves weights by 1e-2 a step."""
    options = dict(options)
    layer_decay = options.pop("layer_decay", None)
    found = []
    for name in ("fusedadamw", "adamw"):
        model = network()
        task, extra = task_of(model), {"ema_decay": DECAY} if name == "fusedadamw" else {}
        given = arguments(opt=name, layer_decay=layer_decay)
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(given), **extra)
        if name == "fusedadamw":
            task.trainable_module_ema = FusedModelEma(model, optimizer)
        else:
            task.setup_ema(decay=DECAY)
            task.trainable_module_ema.get_decay = lambda step: DECAY  # no copy at the first step
        if options.get("scaler"):
            options["scaler"] = utils.NativeScaler(device="cpu")
        train(task, optimizer, batches(4), **options)
        found.append((task.get_checkpoint_state(), task.get_checkpoint_state(ema=True)))
    keys = ("state_dict", "state_dict_ema")
    for key, ours, theirs in zip(keys, *found, strict=True):
        assert_close(ours[key], theirs[key], rtol=0, atol=1e-9)
    weights, average = (state["fc.weight"] for state in (found[0][0]["state_dict"], ours[key]))
    assert (weights - average).abs().max() > 1e-3


@pytest.mark.parametrize("exclude_buffers", [False, True])
def test_a_run_goes_on_bit_for_bit(exclude_buffers, tmp_path):
    """Checkpoints of timm's saver, loaded as train.py loads them."""

    def begin(checkpoint: str | None = None):
        model = network(seed=1 if checkpoint else 0)
        task = task_of(model)
        optimizer = create_optimizer_v2(
            model, **optimizer_kwargs(arguments()), ema_decay=DECAY, kappa=2
        )
        if checkpoint:
            task_module.resume_task_checkpoint(task, checkpoint, optimizer, log_info=False)
        task.trainable_module_ema = FusedModelEma(model, optimizer, exclude_buffers)
        if checkpoint:
            task_module.load_task_ema_checkpoint(task, checkpoint)
        return task, optimizer

    task, optimizer = begin()
    train(task, optimizer, batches(3))
    saver = utils.CheckpointSaver(
        model=task.get_trainable_module(),
        optimizer=optimizer,
        args=argparse.Namespace(model="net"),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
        task=task,
    )
    saver.save_checkpoint(0, metric=1.0)
    resumed, other = begin(str(tmp_path / "last.pth.tar"))
    for one, opt in ((task, optimizer), (resumed, other)):
        train(one, opt, batches(3, seed=1))
    ended = [
        {
            **one.get_checkpoint_state()["state_dict"],
            **_prefixed(one.get_checkpoint_state(ema=True)),
        }
        for one in (task, resumed)
    ]
    assert_close(ended[1], ended[0], rtol=0, atol=0)
    module, ema = task.get_trainable_module(), task.get_eval_model(ema=True)
    assert torch.equal(module.bn1.running_mean, ema.module.bn1.running_mean) == exclude_buffers
    expected = task.get_trainable_module(ema=True).module(batches(1)[0][0])
    assert torch.equal(ema(batches(1)[0][0]), expected)


def _prefixed(state: dict) -> dict:
    return {f"ema.{name}": value for name, value in state["state_dict_ema"].items()}


def test_a_bfloat16_model_has_a_float32_average():
    model = network().bfloat16()
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(arguments()), ema_decay=DECAY)
    ema = FusedModelEma(model, optimizer)
    start = {name: value.clone() for name, value in ema.module.named_parameters()}
    model(batches(1)[0][0].bfloat16()).square().sum().backward()
    optimizer.step()
    for name, param in model.named_parameters():
        expected = start[name] + (1 - DECAY) * (param.detach().float() - start[name])
        torch.testing.assert_close(dict(ema.module.named_parameters())[name].data, expected)
    ema.set(model)
    assert_close(ema.module.state_dict(), model.float().state_dict(), rtol=0, atol=0)


def test_the_average_of_any_optimizer_and_what_is_refused():
    model, other = network(), network(1)
    sgd = create_optimizer_v2(model, opt="sgd", lr=0.1)
    ema = FusedModelEma(model, follower := FusedEMA(sgd, ema_decay=0.0))
    model(batches(1)[0][0]).square().sum().backward()
    sgd.step()
    assert_close(ema.module.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert follower.state[model.fc.weight]["ema"] is ema.module.fc.weight
    with pytest.raises(TypeError, match="optimizer: received a SGD; allowed: a fused optimizer"):
        FusedModelEma(model, sgd)
    with pytest.raises(ValueError, match="ema_decay=None"):
        FusedModelEma(other, create_optimizer_v2(other, opt="fusedsgd", lr=0.1))


def test_the_page_and_the_example_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pages.run_page("frameworks/timm.md")
    pages.run_example("train_timm.py", monkeypatch)
    assert "of the average" in capsys.readouterr().out

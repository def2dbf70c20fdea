"""Config files: the page's are executed with Hydra and LightningCLI, and lists count as tuples."""

from __future__ import annotations

import warnings

import pages
import pytest
import torch
from optimizers import OPTIMIZERS
from pages import one_thread  # noqa: F401
from torch import nn

from fused_ema import FusedEMA, FusedScaledAdamW, PowerDecay, ProgressiveScaling, WarmUpDecay

PAGE = "frameworks/configs.md"
pytestmark = pytest.mark.filterwarnings("ignore")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    omegaconf = pytest.importorskip("omegaconf")


def test_the_page_runs(tmp_path, monkeypatch):
    for package in ("hydra", "jsonargparse", "lightning.pytorch"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    for name, text in zip(
        ("conf/train.yaml", "lightning.yaml"), pages.blocks(PAGE, "yaml"), strict=True
    ):
        (tmp_path / name).write_text(text)
    names = pages.run_page(PAGE, {"__name__": "__main__"})
    (group,) = names["opt"].param_groups
    assert group["ema_decay"] == (0.99, PowerDecay.from_sigma_rel(0.1))
    assert (group["lr"], group["betas"]) == (1e-3, (0.9, 0.95))
    assert names["config"].kappa == 8
    assert names["opt"].kappa == 1.0  # progressive scaling begins at 64
    saved = torch.load("state.pt", weights_only=True)
    assert saved["param_groups"][0]["kappa"] == 8.0
    trainer = names["cli"].trainer
    (opt,) = trainer.optimizers
    assert type(opt) is FusedScaledAdamW
    (group,) = opt.param_groups
    assert tuple(group["ema_decay"]) == (0.99, WarmUpDecay(0.999))
    assert (group["lr"], tuple(group["betas"]), group["kappa"]) == (1e-3, (0.9, 0.95), 4)
    assert group["base_steps"] == 4 * trainer.global_step == 128
    average = opt.ema_state_dict(trainer.lightning_module, index=1)
    assert average.keys() == {"net.weight", "net.bias"}


KINDS = {"list": list, "ListConfig": lambda values: omegaconf.OmegaConf.create(list(values))}


def stepped(make, steps: int = 2):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    opt = make(model)
    for _ in range(steps):
        opt.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        opt.step()
    return model, opt


def assert_same_state(found, expected) -> None:
    for ours, theirs in zip(found.values(), expected.values(), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            several = value if isinstance(value, tuple) else (value,)
            held = ours[key] if isinstance(value, tuple) else (ours[key],)
            assert all(map(torch.equal, held, several)), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_lists(name, kind, tmp_path):
    """In its arguments, in param groups and later; its state is plain and loads as another's."""
    own, listed = OPTIMIZERS[name], KINDS[kind]
    tuples = {"ema_decay": (0.5, 0.9)}
    tuples |= {k: v for k, v in own.options.items() if isinstance(v, tuple)}
    options = {k: v for k, v in own.options.items() if k not in tuples}
    lists = {key: listed(value) for key, value in tuples.items()}

    def set_later(model):
        opt = own.ours(model.parameters(), **options, ema_decay=(0.1, 0.2))
        opt.param_groups[0].update(lists)
        return opt

    _, expected = stepped(lambda m: own.ours(m.parameters(), **options, **tuples))
    for make in (
        lambda m: own.ours(m.parameters(), **options, **lists),
        lambda m: own.ours([{"params": m.parameters(), **lists}], **options),
        set_later,
    ):
        _, opt = stepped(make)
        assert_same_state(opt.state, expected.state)
        torch.save(opt.state_dict(), tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
        expected.load_state_dict(saved)
        assert opt.scaled_hyperparameters() == expected.scaled_hyperparameters()


@pytest.mark.parametrize("kind", KINDS)
def test_fused_ema_takes_lists(kind):
    found = []
    for decays in ((0.5, 0.9), KINDS[kind]((0.5, 0.9))):
        averages = []

        def make(model, decays=decays, averages=averages):
            opt = torch.optim.SGD(model.parameters(), lr=0.1)
            averages.append(FusedEMA(opt, decays, model=model))
            return opt

        model, _ = stepped(make)
        found.append([averages[0].ema_state_dict(model, index)["weight"] for index in range(2)])
    assert all(map(torch.equal, *found))
    assert not torch.equal(*found[0])


def test_progressive_scaling_takes_a_mapping_of_omegaconf():
    _, opt = stepped(lambda m: FusedScaledAdamW(m.parameters(), ema_decay=0.9))
    progress = ProgressiveScaling(opt, 64, omegaconf.OmegaConf.create({0: 64, 1: 256}))
    assert opt.kappa == 1.0
    progress.step()
    assert opt.kappa == 4.0

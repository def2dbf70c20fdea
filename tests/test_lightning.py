"""EMACallback with Lightning's Trainer: what runs on the average, and what checkpoints hold."""

from __future__ import annotations

import copy
import warnings

import pages
import pytest
import torch
from pages import one_thread  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
    from lightning.pytorch.plugins.precision import MixedPrecision

    from fused_ema.integrations.lightning import EMACallback

from fused_ema import FusedScaledAdamW, FusedScaledSGD, ProgressiveScaling

pytestmark = pytest.mark.filterwarnings("ignore")

DECAY = 0.8


def batches(count: int, seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(torch.randn(count, 16, 4, generator=generator), batch_size=None)


class Net(lightning.LightningModule):
    """Records the weights that it sees; `make` makes its optimizers."""

    def __init__(self, make=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        # no bias before BatchNorm, whose gradient is pure rounding, which Adam would magnify
        self.net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.make = make or adamw
        self.seen: dict[str, list] = {}
        self.losses: list[float] = []
        self.average = None

    def loss(self, batch):
        batch = batch.to(self.net[0].weight.dtype)
        return (self.net(batch) - batch.prod(1, keepdim=True)).square().mean()

    def see(self, stage: str) -> None:
        state = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.seen.setdefault(stage, []).append(state)

    def on_train_start(self):
        self.see("start")
        if self.average is not None:
            self.seen["average"] = [self.average()]

    def training_step(self, batch, _):
        return self.loss(batch)

    def validation_step(self, batch, _):
        self.see("validate")
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("val", loss)

    def test_step(self, batch, batch_idx):
        self.see("test")

    def predict_step(self, batch, _):
        self.see("predict")

    def configure_optimizers(self):
        return self.make(self)


def adamw(module):
    return FusedScaledAdamW(module.parameters(), lr=0.02, ema_decay=DECAY, model=module)


def trainer(folder, *callbacks, epochs: int = 2, **options):
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"enable_checkpointing": False, **options},
    )


def fit(folder, module, *callbacks, ckpt_path=None, **options):
    made = trainer(folder, *callbacks, **options)
    made.fit(module, batches(4, 1), batches(1, 2), ckpt_path=ckpt_path, weights_only=False)
    return made


def average(module, optimizer) -> dict:
    return {k: v.clone() for k, v in optimizer.ema_state_dict(module.net).items()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_differ(found: dict, other: dict) -> None:
    assert not torch.equal(found["0.weight"], other["0.weight"])


def test_validation_test_and_prediction_see_the_average(tmp_path):
    module = Net()
    made = fit(tmp_path, module, EMACallback())
    expected = average(module, made.optimizers[0])
    weights = copy.deepcopy(module.net.state_dict())
    assert_same(module.seen["validate"][-1], expected)
    made.test(module, batches(1, 2), verbose=False)
    made.predict(module, batches(1, 2))
    made.validate(module, batches(1, 2), verbose=False)
    for stage in ("test", "predict", "validate"):
        assert_same(module.seen[stage][-1], expected)
    assert_same(module.net.state_dict(), weights)
    assert_differ(weights, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_restores_the_weights(error, tmp_path):
    module = Net()
    made = fit(tmp_path, module, EMACallback())
    weights = copy.deepcopy(module.net.state_dict())

    def fail(*_):
        assert_differ(module.net.state_dict(), weights)
        raise error

    module.validation_step = fail
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        made.validate(module, batches(1, 2))
    assert_same(module.net.state_dict(), weights)
    made.optimizers[0].state_dict()  # which raises while the weights hold the average


def test_every_so_many_epochs(tmp_path):
    module = Net()
    made = fit(tmp_path, module, EMACallback(every_n_epochs=2), epochs=3)
    assert len(module.seen["validate"]) == 3
    assert_same(module.seen["validate"][2], module.net.state_dict())
    assert_differ(module.seen["validate"][2], average(module, made.optimizers[0]))
    always = Net()
    fit(tmp_path, always, EMACallback(), epochs=3)
    assert_same(module.seen["validate"][1], always.seen["validate"][1])
    assert_differ(module.seen["validate"][0], always.seen["validate"][0])
    with pytest.raises(ValueError, match="every_n_epochs=0 is out of range; allowed: an int >= 1"):
        EMACallback(every_n_epochs=0)


def test_the_same_validation_as_lightnings_own_average(tmp_path):
    """Its average starts with the weights after the first step."""

    def ours(module):
        def decay(t):
            return DECAY if t > 0 else 0.0

        return FusedScaledAdamW(
            module.parameters(), lr=0.02, ema_decay=decay, model=module, ema_buffers="average"
        )

    def theirs(module):
        return torch.optim.AdamW(module.parameters(), lr=0.02)

    losses = []
    for make, callback in ((ours, EMACallback()), (theirs, EMAWeightAveraging(decay=DECAY))):
        module = Net(make)
        fit(tmp_path, module, callback, epochs=4)
        losses.append(module.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 4


def saved(folder, make=None, callback=None, epochs: int = 2):
    module = Net(make)
    made = fit(folder, module, callback or EMACallback(), epochs=epochs)
    path = str(folder / "saved.ckpt")
    made.save_checkpoint(path)
    return path, module, made


def test_a_checkpoint_holds_the_average_and_the_weights(tmp_path):
    path, module, made = saved(tmp_path)
    checkpoint = torch.load(path, weights_only=False)
    assert_same(checkpoint["current_model_state"], module.state_dict())
    found = Net.load_from_checkpoint(path, weights_only=False)
    expected = average(module, made.optimizers[0])
    assert_same(found.net.state_dict(), expected)
    assert_differ(expected, module.net.state_dict())
    assert checkpoint["state_dict"]["net.0.weight"].data_ptr() != expected["0.weight"].data_ptr()


@pytest.mark.parametrize("kind", ["fused", "FusedEMA"])
def test_a_run_goes_on_bit_for_bit(kind, tmp_path):
    def torchs(module):
        return torch.optim.AdamW(module.parameters(), lr=0.02)

    make, options = (adamw, {}) if kind == "fused" else (torchs, {"ema_decay": DECAY})
    path, *_ = saved(tmp_path, make, EMACallback(**options))
    resumed, whole = Net(make), Net(make)
    fit(tmp_path, resumed, EMACallback(**options), ckpt_path=path, epochs=4)
    fit(tmp_path, whole, EMACallback(**options), epochs=4)
    assert_same(resumed.net.state_dict(), whole.net.state_dict())
    for found, expected in zip(resumed.seen["validate"], whole.seen["validate"][2:], strict=True):
        assert_same(found, expected)
    assert_differ(whole.seen["validate"][-1], whole.net.state_dict())


def test_after_a_loaded_checkpoint_nothing_replaces_it(tmp_path):
    module, best = Net(), ModelCheckpoint(tmp_path, monitor="val", mode="max")
    made = fit(tmp_path, module, EMACallback(), best, enable_checkpointing=True, epochs=3)
    ranked = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    ranked = {name.removeprefix("net."): value for name, value in ranked.items()}
    assert_same(ranked, module.seen["validate"][module.losses.index(max(module.losses))])
    made.test(module, batches(1, 2), ckpt_path="best", weights_only=False, verbose=False)
    made.predict(module, batches(1, 2))
    other = Net()
    anew = trainer(tmp_path, EMACallback())
    anew.validate(
        other, batches(1, 2), ckpt_path=best.best_model_path, weights_only=False, verbose=False
    )
    for seen in (module.seen["test"], module.seen["predict"], other.seen["validate"]):
        assert_same(seen[-1], ranked)
    loaded = Net.load_from_checkpoint(best.best_model_path, weights_only=False)
    made.fit_loop.max_epochs = 4
    made.fit(module, batches(4, 1), batches(1, 2))
    assert_same(module.seen["validate"][-1], average(module, made.optimizers[0]))
    made.test(loaded, batches(1, 2), verbose=False)
    assert_same(loaded.seen["test"][-1], ranked)


def test_checkpoints_go_both_ways_with_lightnings_own_average(tmp_path):
    def theirs(module):
        return torch.optim.AdamW(module.parameters(), lr=0.02)

    path, module, made = saved(tmp_path)
    callback = EMAWeightAveraging(decay=DECAY, use_buffers=False)
    other = Net(theirs)
    other.average = lambda: copy.deepcopy(callback._average_model.module.net.state_dict())
    fit(tmp_path, other, callback, ckpt_path=path, epochs=3)
    assert_same(other.seen["start"][0], module.net.state_dict())
    assert_same(other.seen["average"][0], average(module, made.optimizers[0]))

    path, *_ = saved(tmp_path, theirs, EMAWeightAveraging(decay=DECAY))
    checkpoint = torch.load(path, weights_only=False)
    for make, options in ((adamw, {}), (theirs, {"ema_decay": DECAY})):
        other, callback = Net(make), EMACallback(**options)
        other.average = lambda o=other, c=callback: average(o, c.averages(o.trainer, o)[0])
        fit(tmp_path, other, callback, ckpt_path=path, epochs=3)
        for name, param in other.seen["start"][0].items():
            assert torch.equal(param, checkpoint["current_model_state"][f"net.{name}"])
        for name, _ in other.net.named_parameters():
            expected = checkpoint["state_dict"][f"net.{name}"]
            assert torch.equal(other.seen["average"][0][name], expected)


class Two(Net):
    """Two optimizers, stepped by hand, through Lightning's wrappers."""

    def __init__(self, make) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch, _):
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.parametrize("decays", [(0.5, 0.9), (0.5, None)])
def test_several_optimizers(decays, tmp_path):
    def make(module):
        parts = module.net[0].parameters(), module.net[1:].parameters()
        return [
            FusedScaledSGD(part, lr=0.02, ema_decay=decay, model=module)
            for part, decay in zip(parts, decays, strict=True)
        ]

    module = Two(make)
    made = fit(tmp_path, module, EMACallback())
    first, second = made.optimizers
    state = module.seen["validate"][-1]
    assert torch.equal(state["0.weight"], first.state[module.net[0].weight]["ema"])
    last = module.net[2].weight
    assert torch.equal(state["2.weight"], second.state[last]["ema"] if decays[1] else last)
    made.save_checkpoint(tmp_path / "two.ckpt")
    assert_same(Two.load_from_checkpoint(tmp_path / "two.ckpt", make=make).net.state_dict(), state)


def test_without_an_optimizer_and_without_an_average(tmp_path):
    module = Two(lambda _: None)
    module.training_step = lambda *_: None
    made = fit(tmp_path, module, EMACallback())
    made.save_checkpoint(tmp_path / "none.ckpt")
    assert "current_model_state" not in torch.load(tmp_path / "none.ckpt", weights_only=False)
    made.test(module, batches(1, 2), verbose=False)

    def torchs(module):
        return torch.optim.SGD(module.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="no optimizer has an average; pass ema_decay="):
        fit(tmp_path, Net(torchs), EMACallback())


PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_clipping_in_every_precision(precision, tmp_path):
    """Clipped to nothing, the weights stay, and the average with them; else both move."""
    chosen = {"precision": precision}
    if precision == "16-mixed":  # which a Trainer refuses on the CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        chosen = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}

    def sgd(module):
        return FusedScaledSGD(module.parameters(), lr=0.02, ema_decay=DECAY, model=module)

    for clip in (0.5, 1e-30):
        module = Net(sgd)
        start = copy.deepcopy(module.net.state_dict())
        made = fit(tmp_path, module, EMACallback(), gradient_clip_val=clip, **chosen)
        weight = module.net[0].weight.detach()
        seen = module.seen["validate"][-1]["0.weight"]
        held = made.optimizers[0].state[module.net[0].weight]["ema"]
        assert torch.equal(seen, held.to(seen.dtype))
        assert torch.equal(weight, start["0.weight"].to(weight.dtype)) == (clip < 1e-3)
        assert torch.equal(weight, seen) == (clip < 1e-3)


def test_through_lightnings_wrapper(tmp_path):
    module = Net()
    made = fit(tmp_path, module, EMACallback())
    inner, wrapper = made.optimizers[0], module.optimizers()
    assert type(wrapper) is not type(inner)
    wrapper.kappa = 4.0
    assert inner.kappa == 4.0
    ProgressiveScaling(wrapper, 16, {0: 32})
    assert inner.kappa == wrapper.kappa == 2.0
    expected = average(module, inner)
    assert_same(wrapper.ema_state_dict(module.net), expected)
    with wrapper.ema_weights():
        assert_same(module.net.state_dict(), expected)
        with pytest.raises(RuntimeError, match="inside ema_weights"):
            inner.state_dict()
    assert vars(wrapper).keys() == {
        *("_optimizer", "_strategy", "_on_before_step", "_on_after_step"),
    }


def test_the_page_and_the_example_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = pages.run_page("frameworks/lightning.md")
    assert "optimizer_states" in torch.load(
        names["trainer"].checkpoint_callback.best_model_path, weights_only=True
    )
    pages.run_example("train_lightning.py", monkeypatch)
    assert float(capsys.readouterr().out.split("the best average: ")[1]) > 0.8

"""Progressive scaling: kappa follows the batch size, all else goes on, resume is bit-exact."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from fused_ema import CosineDecay, FusedScaledAdamW, FusedScaledSGD, PowerDecay, ProgressiveScaling

SIZES = {0: 8, 2: 32, 3: 48}
SAMPLES = 96  # an epoch


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


class Run:
    """A small regression trained with AdamW, averages, a learning-rate schedule and stages."""

    def __init__(self, unit: str = "epochs", scheduler_first: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        self.data = torch.randn(SAMPLES, 5, generator=generator)
        self.model = nn.Linear(5, 2)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        decays = (0.99, CosineDecay(0.9, 100.0), PowerDecay(6.94))
        self.opt = FusedScaledAdamW(self.model.parameters(), lr=1e-2, ema_decay=decays)
        sizes = SIZES if unit == "epochs" else {SAMPLES * e: size for e, size in SIZES.items()}
        if scheduler_first:
            self.lr = CosineAnnealingLR(self.opt, T_max=6)
            self.scaling = ProgressiveScaling(self.opt, 8, sizes, unit=unit)
        else:
            self.scaling = ProgressiveScaling(self.opt, 8, sizes, unit=unit)
            self.lr = CosineAnnealingLR(self.opt, T_max=6)

    def step(self, first: int) -> int:
        """Train on a batch that begins at a sample of the epoch; returns the next one's."""
        rows = self.data[first : first + self.scaling.batch_size]
        self.opt.zero_grad()
        (self.model(rows) - rows[:, :2].sin()).square().mean().backward()
        self.opt.step()
        if self.scaling.unit == "samples":
            self.scaling.step(len(rows))
        return first + len(rows)

    def epoch(self, first: int = 0, scheduler_first: bool = True) -> list[float]:
        """The rest of an epoch; returns kappa at each of its steps."""
        kappas = []
        while first < SAMPLES:
            kappas.append(self.opt.kappa)
            first = self.step(first)
        steps = [self.lr.step]
        if self.scaling.unit == "epochs":
            steps.append(self.scaling.step)
        for step in steps if scheduler_first else reversed(steps):
            step()
        return kappas

    def parts(self):
        return {"model": self.model, "opt": self.opt, "lr": self.lr, "scaling": self.scaling}

    def saved(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        states = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(states[name])


def assert_equal(run: Run, other: Run) -> None:
    assert run.scaling.position == other.scaling.position
    assert run.opt.kappa == other.opt.kappa
    for group, twin in zip(run.opt.param_groups, other.opt.param_groups, strict=True):
        assert group["base_steps"] == twin["base_steps"]
        assert group["lr"] == twin["lr"]
    params = zip(run.model.parameters(), other.model.parameters(), strict=True)
    for p, q in params:
        assert torch.equal(p, q)
        assert run.opt.state[p].keys() == other.opt.state[q].keys()
        for key, value in run.opt.state[p].items():
            assert torch.equal(value, other.opt.state[q][key]), key


def test_kappa_follows_the_epochs():
    run = Run()
    assert run.opt.kappa == 1.0
    seen = [run.epoch() for _ in range(5)]
    assert seen == [[1.0] * 12, [1.0] * 12, [4.0] * 3, [6.0] * 2, [6.0] * 2]
    assert run.scaling.position == 5
    assert (run.scaling.batch_size, run.scaling.kappa) == (48, 6.0)
    assert run.opt.param_groups[0]["base_steps"] == 5 * SAMPLES / 8


def test_samples_change_the_batch_within_an_epoch():
    p = weight()
    opt = FusedScaledSGD([p], lr=0.1)
    scaling = ProgressiveScaling(opt, 16, {100: 64, 0: 24, 10: 32}, unit="samples")
    found = [(scaling.position, scaling.batch_size, opt.kappa)]
    for count in (9, 1, 89, 0, 1):
        scaling.step(count)
        found.append((scaling.position, scaling.batch_size, opt.kappa))
    assert found == [
        (0, 24, 1.5),
        (9, 24, 1.5),
        (10, 32, 2.0),
        (99, 32, 2.0),
        (99, 32, 2.0),
        (100, 64, 4.0),
    ]
    # several starts at once
    other = ProgressiveScaling(opt, 16, {0: 16, 10: 32, 100: 64}, unit="samples")
    assert opt.kappa == 1.0
    other.step(1000)
    assert opt.kappa == 4.0


@pytest.mark.parametrize("epochs", [0, 1, 2, 3, 4])
def test_resume_at_an_epoch_is_bit_exact(epochs):
    straight = Run()
    for _ in range(epochs):
        straight.epoch()
    resumed = Run()
    resumed.load(straight.saved())
    assert_equal(straight, resumed)
    assert [straight.epoch() for _ in range(3)] == [resumed.epoch() for _ in range(3)]
    assert_equal(straight, resumed)


@pytest.mark.parametrize("steps", [5, 12 + 11, 24 + 1, 24 + 3 + 1])
def test_resume_within_an_epoch_is_bit_exact(steps):
    straight, first = Run("samples"), 0
    for _ in range(steps):
        first = straight.step(first)
        if first == SAMPLES:
            straight.lr.step()
            first = 0
    resumed = Run("samples")
    resumed.load(straight.saved())
    assert_equal(straight, resumed)
    for run in (straight, resumed):
        run.epoch(first)
        run.epoch()
    assert straight.opt.kappa > 1.0
    assert_equal(straight, resumed)


def test_units_agree():
    by_epochs, by_samples = Run("epochs"), Run("samples")
    assert [by_epochs.epoch() for _ in range(5)] == [by_samples.epoch() for _ in range(5)]
    by_samples.scaling.position //= SAMPLES
    assert_equal(by_epochs, by_samples)


def test_the_order_beside_a_learning_rate_scheduler_does_not_matter():
    first, last = Run(scheduler_first=True), Run(scheduler_first=False)
    for _ in range(5):
        first.epoch()
        last.epoch(scheduler_first=False)
    assert_equal(first, last)


def test_moments_and_averages_stay_when_kappa_changes():
    run = Run()
    run.epoch()
    run.epoch()
    tensors = [value for state in run.opt.state.values() for value in state.values()]
    assert len(tensors) == 2 * 6
    held = [(value.data_ptr(), value.clone()) for value in tensors]
    assert run.opt.kappa == 4.0
    run.opt.kappa = 1.0
    run.scaling.load_state_dict(run.scaling.state_dict())
    assert run.opt.kappa == 4.0
    again = [value for state in run.opt.state.values() for value in state.values()]
    assert all(value is other for value, other in zip(tensors, again, strict=True))
    assert [value.data_ptr() for value in again] == [pointer for pointer, _ in held]
    assert all(torch.equal(value, old) for value, (_, old) in zip(again, held, strict=True))
    run.epoch()  # the same memory is stepped on
    assert [value.data_ptr() for value in again] == [pointer for pointer, _ in held]
    assert not any(torch.equal(value, old) for value, (_, old) in zip(again, held, strict=True))


def test_kappa_is_written_at_changes_alone():
    """Between them it is the user's."""
    opt = FusedScaledSGD([weight()], lr=0.1)
    scaling = ProgressiveScaling(opt, 8, SIZES)
    opt.kappa = 2.0
    scaling.step()
    assert opt.kappa == 2.0
    scaling.step()
    assert opt.kappa == 4.0


def test_a_tensor_kappa_is_filled_in_place():
    kappa = torch.tensor(1.0, dtype=torch.float64)
    opt = FusedScaledSGD([weight()], lr=0.1, kappa=kappa, capturable=True)
    scaling = ProgressiveScaling(opt, 8, {0: 16, 1: 64})
    assert opt.param_groups[0]["kappa"] is kappa
    assert kappa == 2.0
    scaling.step()
    assert kappa == 8.0


@pytest.mark.parametrize(
    ("base", "sizes", "unit", "message"),
    [
        (8, {}, "epochs", r"batch_sizes=\{\} has none for the start; allowed: a key 0"),
        (8, {1: 16}, "epochs", r"batch_sizes=\{1: 16\} has none for the start"),
        (8, {0: 8, -1: 16}, "epochs", "key=-1 is out of range; allowed: an int >= 0"),
        (8, {0: 8, 1.5: 16}, "epochs", r"key=1\.5 is out of range"),
        (8, {False: 8}, "epochs", "key=False is out of range"),
        (8, {0: 8, 3: 0}, "epochs", r"batch_sizes\[3\]=0 is out of range; allowed: 0 < "),
        (8, {0: 8, 3: float("nan")}, "epochs", r"batch_sizes\[3\]=nan is out of range"),
        (8, {0: "8"}, "epochs", r"batch_sizes\[0\]='8' is not a number"),
        (0, {0: 8}, "epochs", "base_batch_size=0 is out of range"),
        (8, {0: 8}, "steps", "unit='steps' is not known; allowed: 'epochs', 'samples'"),
    ],
)
def test_bad_arguments(base, sizes, unit, message):
    opt = FusedScaledSGD([weight()], lr=0.1, kappa=3.0)
    with pytest.raises(ValueError, match=message):
        ProgressiveScaling(opt, base, sizes, unit=unit)
    assert opt.kappa == 3.0


def test_optimizers_that_do_not_fit():
    groups = [{"params": [weight()], "kappa": 2.0}, {"params": [weight()], "kappa": 4.0}]
    with pytest.raises(ValueError, match=r"kappa differs between param groups: \[2\.0, 4\.0\]"):
        ProgressiveScaling(FusedScaledSGD(groups, lr=0.1), 8, SIZES)
    with pytest.raises(TypeError, match="optimizer: received a AdamW; it has no kappa"):
        ProgressiveScaling(torch.optim.AdamW([weight()]), 8, SIZES)


def test_a_batch_size_out_of_reach_is_refused_before_training():
    opt = FusedScaledAdamW([weight()], beta_scaling="linear", kappa=2.0)
    with pytest.raises(ValueError, match="beta_scaling='linear'"):
        ProgressiveScaling(opt, 8, {0: 8, 60: 8 * 64, 80: 8})
    assert opt.kappa == 2.0


def test_a_change_that_the_optimizer_refuses_moves_nothing():
    opt = FusedScaledAdamW([weight()], lr=1e-2)
    scaling = ProgressiveScaling(opt, 8, SIZES)
    scaling.step()
    opt.param_groups[0]["weight_decay"] = 200.0
    for move in (scaling.step, lambda: scaling.load_state_dict({"unit": "epochs", "position": 9})):
        with pytest.raises(ValueError, match="removes the whole weight"):
            move()
        assert scaling.position == 1
        assert opt.kappa == 1.0
    opt.param_groups[0]["weight_decay"] = 0.1
    scaling.step()
    assert opt.kappa == 4.0


@pytest.mark.parametrize(
    ("unit", "samples", "message"),
    [
        ("epochs", 96, "samples=96 with unit='epochs'; allowed: None, a call is an epoch"),
        ("samples", None, "samples=None with unit='samples'; allowed: a count >= 0"),
        ("samples", -1, "samples=-1 is out of range; allowed: an int >= 0"),
        ("samples", 0.5, r"samples=0\.5 is out of range; allowed: an int >= 0"),
    ],
)
def test_steps_of_the_wrong_kind(unit, samples, message):
    scaling = ProgressiveScaling(FusedScaledSGD([weight()], lr=0.1), 8, SIZES, unit=unit)
    with pytest.raises(ValueError, match=message):
        scaling.step(samples)
    assert scaling.position == 0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"unit": "samples", "position": 3}, "unit='samples'; allowed: 'epochs'"),
        ({"unit": "epochs", "position": -3}, "position=-3 is out of range"),
    ],
)
def test_states_that_do_not_fit(state, message):
    opt = FusedScaledSGD([weight()], lr=0.1)
    scaling = ProgressiveScaling(opt, 8, SIZES)
    with pytest.raises(ValueError, match=message):
        scaling.load_state_dict(state)
    assert (scaling.position, opt.kappa) == (0, 1.0)

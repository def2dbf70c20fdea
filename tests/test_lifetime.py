"""What is dropped is freed: by reference counting alone, and cycles of users' by the collector."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections import Counter

import pytest
import torch
from torch import nn

from fused_ema import CosineDecay, FusedEMA, FusedScaledAdamW, _native


@pytest.fixture(scope="module", autouse=True)
def _first_of_the_process():
    """torch imports more for it, which keeps its frames."""
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])


@pytest.fixture(autouse=True)
def _collector_is_off():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Run:
    """A model and what trains it, without a reference back."""

    def __init__(self, **options) -> None:
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        wrapped = options.pop("wrapped", False)
        if options.pop("names", False):
            options["model"] = self.model
        if options.pop("teacher", False):
            options["teacher"] = copy.deepcopy(self.model)
        dtype = options.pop("dtype", None)
        self.model.to(dtype)
        options = {"ema_decay": 0.9, **options}
        if wrapped:
            self.stepped = torch.optim.AdamW(self.model.parameters())
            self.opt = FusedEMA(self.stepped, **options)
        else:
            self.stepped = self.opt = FusedScaledAdamW(self.model.parameters(), **options)

    def loss(self):
        self.opt.zero_grad()
        x = torch.ones(2, 3, dtype=self.model[0].weight.dtype)
        loss = self.model(x).float().sum()
        loss.backward()
        return loss

    def step(self, times: int = 3) -> None:
        for _ in range(times):
            self.loss()
            self.stepped.step()

    def held(self) -> list[weakref.ref]:
        """All that dropping the run must free."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for entry in self.opt.state.values():
            tensors += [value for value in entry.values() if isinstance(value, torch.Tensor)]
        owners = [self.opt, self.stepped, self.opt._stepper, self.model]
        plans = [plans for plans in (self.opt._stepper.latest,) if plans is not None]
        return [weakref.ref(kept) for kept in (*tensors, *owners, *plans)]


def alive(run: Run) -> list[type]:
    """What is still there after the caller's last reference to the run has gone."""
    held = run.held()
    run.__dict__.clear()
    return [type(ref()) for ref in held if ref() is not None]


def unstepped(run: Run) -> None:
    pass


def steps(run: Run) -> None:
    run.step()


def closures(run: Run) -> None:
    run.stepped.step(run.loss)


def schedulers(run: Run) -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(run.stepped, 1)
    run.step()
    scheduler.step()


def scaled(run: Run) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for value in (1.0, float("inf"), 1.0):
        run.opt.zero_grad()
        loss = run.model(torch.ones(2, 3)).sum() * value
        scaler.scale(loss).backward()
        scaler.step(run.stepped)
        scaler.update(2.0)


def refused(run: Run) -> None:
    run.step()
    run.opt.param_groups[0]["kappa"] = -1.0
    with pytest.raises(ValueError, match="kappa"):
        run.step()


def interrupted(run: Run) -> None:
    def closure():
        raise KeyboardInterrupt

    run.step()
    with pytest.raises(KeyboardInterrupt):
        run.opt.step(closure)


def reading(run: Run) -> None:
    run.step()
    with run.opt.ema_weights():
        run.model(torch.ones(2, 3))
    run.opt.ema_state_dict(run.model)
    run.opt.copy_ema_to(copy.deepcopy(run.model))


def saving(run: Run) -> None:
    run.step()
    run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))
    run.step()


def copying(run: Run) -> None:
    run.step()
    for duplicate in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        twin = duplicate(vars(run))
        twin["stepped"].step()
        ref = weakref.ref(twin["opt"])
        del twin
        assert ref() is None


def growing(run: Run) -> None:
    run.step()
    run.stepped.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    run.step()


@pytest.mark.parametrize("wrapped", [False, True], ids=["own", "any"])
@pytest.mark.parametrize(
    "use",
    [
        *(unstepped, steps, closures, schedulers, scaled, refused, interrupted, reading),
        *(saving, copying, growing),
    ],
)
def test_reference_counting_frees_all(use, wrapped):
    run = Run(wrapped=wrapped, names=True)
    use(run)
    assert alive(run) == []


@pytest.mark.parametrize("wrapped", [False, True], ids=["own", "any"])
def test_reference_counting_frees_all_on_every_backend(backend, wrapped):
    run = Run(backend=backend, wrapped=wrapped)
    run.step()
    assert set(run.opt.backends) == {backend}
    assert alive(run) == []


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": (CosineDecay(0.9, 10.0), 0.5)},
        {"ema_decay": None},
        {"max_grad_norm": 1.0},
        {"ema_every": 2},
        {"capturable": True, "backend": "triton"},
        {"ema_format": "delta"},
        {"master_weights": True, "dtype": torch.bfloat16},
        {"teacher": True, "names": True, "ema_buffers": "average"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_reference_counting_frees_all_with_every_option(options):
    run = Run(**options)
    run.step()
    assert alive(run) == []


class Trainer(Run):
    """A run that a parameter refers back to."""

    def __init__(self, how: str, **options) -> None:
        super().__init__(**options)
        for param in self.model.parameters():
            if how == "attribute":
                param.owner = self
            else:
                param.register_hook(self.watch)

    def watch(self, grad) -> None:
        self.norm = grad.norm()


@pytest.mark.parametrize("how", ["attribute", "hook"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["own", "any"])
def test_the_collector_frees_a_cycle_through_a_parameter(backend, wrapped, how):
    trainer = Trainer(how, backend=backend, wrapped=wrapped)
    trainer.step()
    held = trainer.held()
    del trainer
    assert any(ref() is not None for ref in held)  # or there was no cycle to find
    gc.collect()
    assert [type(ref()) for ref in held if ref() is not None] == []


def slots(params) -> _native.Slots:
    return _native.Slots(
        num_scalars=len(_native.rule_scalars()["adam"]),
        frozen=False,
        takes_grads=True,
        capturable=False,
        master=False,
        params=params,
        steps=[torch.zeros((), dtype=torch.float64) for _ in params],
        states=[[torch.zeros(3), torch.zeros(3)] for _ in params],
        emas=[[torch.zeros(3)] for _ in params],
        groups=[0 for _ in params],
        param_indices=list(range(len(params))),
    )


def test_the_collector_is_told_of_each_reference_once():
    """More than there are would let it free what is in use, fewer keep what is not."""
    params = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    entries = {p: {"step": torch.zeros(()), "exp_avg": torch.zeros(3)} for p in params}
    groups = [{"params": params}]
    kept = [*params, groups[0]["params"], entries, *entries.values()]
    kept += [value for entry in entries.values() for value in entry.values()]
    kept.append(slots(params))
    plans = (slots, lambda _: _native.Plan("adam", "plain", kept[-1], False))
    for make in (*plans, lambda _: _native.Watch(groups, entries)):
        before = [sys.getrefcount(thing) for thing in kept]
        made = make(params)
        after = [sys.getrefcount(thing) for thing in kept]
        owned = [n - m for n, m in zip(after, before, strict=True)]
        told = Counter(map(id, gc.get_referents(made)))
        assert gc.is_tracked(made)
        assert sum(owned) > 0
        assert [told[id(thing)] for thing in kept] == owned
        del made


def hooks(opt) -> tuple[int, int]:
    return len(opt._optimizer_step_pre_hooks), len(opt._optimizer_step_post_hooks)


def test_a_dropped_one_unhooks_itself():
    p = nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([p], lr=0.5)
    ema, other = FusedEMA(opt, 0.5), FusedEMA(opt, 0.5)
    p.grad = torch.ones(3)
    opt.step()
    assert hooks(opt) == (2, 2)
    del ema
    assert hooks(opt) == (1, 1)
    opt.step()
    assert torch.equal(other.state[p]["ema"], torch.full((3,), 0.375))  # of 1, 0.5 and 0
    del other
    assert hooks(opt) == (0, 0)
    opt.step()
    FusedEMA(opt, 0.5).remove()
    copies = copy.deepcopy([opt, FusedEMA(opt, 0.5)])
    assert hooks(opt) == (0, 0)
    assert hooks(copies[0]) == (1, 1)
    assert hooks(copies[:1][0]) == (1, 1)
    del copies[1]
    assert hooks(copies[0]) == (0, 0)


@pytest.mark.parametrize("how", ["drop", "collect", "remove"])
@pytest.mark.parametrize("when", ["pre", "post"])
def test_one_that_goes_inside_a_step_leaves_the_step_alone(when, how):
    """torch walks through the hooks there, which must not change in number."""
    p = nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([p], lr=0.5)
    held = []

    def let_go(*_) -> None:
        if held and how == "remove":
            held[0].remove()
        held.clear()
        if how == "collect":
            gc.collect()

    getattr(opt, f"register_step_{when}_hook")(let_go)
    for _ in range(2):
        held.append(FusedEMA(opt, 0.5))
        ref = weakref.ref(held[0])
        if how == "collect":
            held[0].itself = held[0]
        p.grad = torch.ones(3)
        opt.step()
        assert ref() is None
    assert torch.equal(p.detach(), torch.zeros(3))


def test_a_removed_one_follows_no_step_that_is_under_way():
    p = nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([p], lr=0.5)
    ema = FusedEMA(opt, 0.5)
    opt.register_step_pre_hook(lambda *_: ema.remove())
    p.grad = torch.ones(3)
    opt.step()
    opt.step()
    assert torch.equal(ema.state[p]["ema"], torch.ones(3))
    assert ema.param_groups[0]["base_steps"] == 0.0


def test_a_sweep_leaves_nothing_behind():
    """Many trials, as many tensors as before."""

    def count() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    Run().step()
    before = count()
    for trial in range(4):
        run = Run(wrapped=trial % 2 == 0)
        run.step()
        del run
    assert count() == before

"""Gradients that are not plain memory, and memory that goes away while a step is under way."""

from __future__ import annotations

import threading
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fused_ema import FusedScaledAdamW, FusedScaledSGD
from fused_ema._native import is_plain
from fused_ema.optim.stepping import Begun
from fused_ema.step.plans import Plans

BACKENDS = ("native", "triton", "foreach", "reference")


class Later(torch.Tensor):
    """A tensor without memory of its own, as a collective under way gives; copies are awaited."""

    inner: torch.Tensor
    awaited: int

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner, self.awaited = inner, 0

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def wait(later):
            later.awaited += 1
            return later.inner

        args, kwargs = tree_map_only(Later, wait, (args, kwargs or {}))
        return func(*args, **kwargs)


def negated(values):
    return torch.complex(torch.zeros_like(values), -values).conj().imag


def copied_on_write(values):
    return torch._lazy_clone(values)


KINDS = {"wrapper": Later, "negated": negated, "copy on write": copied_on_write}
VALUES = torch.tensor([0.5, -2.0, 3.0, 0.25, 7.0])


def weight(values=VALUES):
    return nn.Parameter(torch.ones_like(values))


def stepped(grad, backend, **options):
    param = weight()
    opt = FusedScaledAdamW([param], lr=0.1, weight_decay=0.1, backend=backend, **options)
    param.grad = grad
    opt.step()
    return param.detach(), opt


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_steps_whatever_holds_its_values(kind, engine):
    expected, plain = stepped(VALUES.clone(), engine, max_grad_norm=2.0)
    found, opt = stepped(KINDS[kind](VALUES.clone()), engine, max_grad_norm=2.0)
    assert torch.equal(found, expected)
    assert not torch.equal(found, torch.ones(5))
    assert opt.grad_norm.item() == plain.grad_norm.item() > 0.0


@pytest.mark.parametrize("engine", BACKENDS)
def test_a_gradient_of_zeros_without_memory_decays_the_weights(engine):
    expected, _ = stepped(torch.zeros(5), engine)
    found, _ = stepped(torch._efficientzerotensor(5), engine)
    assert torch.equal(found, expected)
    assert torch.equal(found, torch.full((5,), 1 - 0.1 * 0.1))


def test_zeros_without_memory_are_not_plain():
    assert is_plain(torch.zeros(2))
    assert not is_plain(torch._efficientzerotensor(2))
    assert not is_plain(Later(torch.zeros(2)))


def test_a_gradient_under_way_is_awaited_once():
    grad = Later(VALUES.clone())
    stepped(grad, "native", max_grad_norm=1.0)
    assert grad.awaited == 1


def refused(grads, backend, error, match):
    """A refusal moves no parameter, not even in a bucket that could step."""
    params = [weight(), nn.Parameter(torch.ones(5, dtype=torch.float64))]
    opt = FusedScaledAdamW(params, lr=0.1, ema_decay=0.5, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    before = [param.detach().clone() for param in params]
    params[0].grad_dtype = None
    params[0].grad = grads
    with pytest.raises(error, match=match):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert [opt.state[param]["step"].item() for param in params] == [1.0, 1.0]


@pytest.mark.parametrize("engine", BACKENDS)
def test_a_gradient_without_values_is_refused(engine):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(VALUES)
    refused(fake, engine, RuntimeError, "fake")


@pytest.fixture
def alone(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("engine", BACKENDS)
def test_a_gradient_that_may_lie_elsewhere_in_part_is_refused(engine, alone):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    for placement in (Replicate(), Shard(0), Partial()):
        grad = DTensor.from_local(VALUES.clone(), mesh, [placement])
        refused(grad, engine, RuntimeError, "received a DTensor")


@pytest.mark.parametrize("engine", BACKENDS)
def test_a_gradient_that_cannot_be_cast_is_refused(engine):
    refused(torch.ones(5, dtype=torch.complex64), engine, RuntimeError, "does not match")


@pytest.mark.parametrize("name", ["weight", "gradient", "exp_avg", "ema"])
def test_memory_that_is_gone_is_refused(name):
    param, other = weight(), nn.Parameter(torch.ones(5, dtype=torch.float64))
    opt = FusedScaledAdamW([other, param], lr=0.1, ema_decay=0.5, backend="native")
    for p in (param, other):
        p.grad = torch.ones_like(p)
    opt.step()
    before = other.detach().clone()
    tensors = {"weight": param, "gradient": param.grad, **opt.state[param]}
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage"):
        opt.step()
    assert torch.equal(other, before)


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16, torch.int32])
def test_a_gradient_of_another_dtype_is_cast(given, stored, engine):
    values = torch.tensor([1.0, -2.0, 3.0])  # exact in every dtype

    def run(cls, **options):
        param = nn.Parameter(torch.ones(3, dtype=stored))
        param.grad_dtype = None
        momentum = 0.5 if given.is_floating_point else 0.0  # torch's would be an integer
        opt = cls([param], lr=0.25, momentum=momentum, **options)
        for _ in range(2):
            param.grad = values.to(given)
            opt.step()
        return param.detach()

    expected = run(torch.optim.SGD, foreach=False)
    assert torch.equal(run(FusedScaledSGD, backend=engine), expected)


# A step that somebody changes the tensors of while it is under way: a schedule, which is asked
# between the first look at a tensor and the kernels.


def with_schedule(act, backend="native", size=None, **options):
    size = size or (40_000 if backend == "native" else 1_000)  # interpreted kernels are slow
    param = nn.Parameter(torch.ones(size))
    calls = []

    def schedule(t):
        calls.append(t)
        if len(calls) > 1:
            act(param)
        return 0.5

    opt = FusedScaledSGD([param], lr=0.5, ema_decay=schedule, backend=backend, **options)
    param.grad = torch.ones(size)
    opt.step()
    param.grad = torch.full((size,), 0.25)
    return param, opt


def spoil_freed_memory(size):
    return [torch.full((size,), float("nan")) for _ in range(4)]


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("size", [100, None])
def test_a_schedule_that_drops_the_gradient(engine, size):
    kept = []

    def act(param):
        param.grad = None
        kept.extend(spoil_freed_memory(param.numel()))

    param, opt = with_schedule(act, engine, size, max_grad_norm=1e9)
    opt.step()
    # asked before gradients are read: there is none, and the average alone moves
    assert torch.equal(param.detach(), torch.full(param.shape, 0.5))
    assert torch.equal(opt.state[param]["ema"], torch.full(param.shape, 0.625))
    assert opt.grad_norm.item() == 0.0


@pytest.mark.parametrize("engine", BACKENDS)
def test_a_schedule_that_replaces_the_weights(engine):
    def act(param):
        param.data = torch.full_like(param, 3.0)

    param, opt = with_schedule(act, engine, 100)
    opt.step()
    assert torch.equal(param.detach(), torch.full((100,), 3.0 - 0.125))


def test_a_schedule_that_frees_the_weights():
    param, opt = with_schedule(lambda p: p.untyped_storage().resize_(0))
    with pytest.raises(RuntimeError, match="storage"):
        opt.step()
    assert opt.state[param]["step"].item() == 1.0
    assert torch.equal(opt.state[param]["ema"], torch.full(param.shape, 0.75))


class Between:
    """Acts between a step's two halves, where another thread may run."""

    def __init__(self, monkeypatch, act):
        original = Plans.running
        monkeypatch.setattr(
            Plans, "running", lambda plans, control: [partial(act), *original(plans, control)]
        )


@pytest.mark.parametrize("engine", BACKENDS)
def test_a_gradient_dropped_between_the_halves_is_taken(engine, monkeypatch):
    param, opt = with_schedule(lambda param: None, engine)
    kept = []

    def act():
        param.grad = None
        kept.extend(spoil_freed_memory(40_000))

    Between(monkeypatch, act)
    opt.step()
    assert torch.equal(param.detach(), torch.full(param.shape, 0.375))


@pytest.mark.parametrize("engine", BACKENDS)
def test_weights_replaced_between_the_halves_are_stepped(engine, monkeypatch):
    param, opt = with_schedule(lambda param: None, engine)
    old = param.detach()

    def act():
        param.data = torch.full_like(old, 2.0)

    Between(monkeypatch, act)
    opt.step()
    assert torch.equal(param.detach(), torch.full(param.shape, 1.875))
    assert torch.equal(old, torch.full(param.shape, 0.5))


@pytest.mark.parametrize("engine", ["native", "triton"])
@pytest.mark.parametrize("freed", ["weight", "gradient", "ema"])
def test_memory_freed_between_the_halves_is_refused(freed, engine, monkeypatch):
    param, opt = with_schedule(lambda param: None, engine)
    tensors = {"weight": param, "gradient": param.grad, "ema": opt.state[param]["ema"]}
    Between(monkeypatch, lambda: tensors[freed].untyped_storage().resize_(0))
    with pytest.raises(RuntimeError, match="storage"):
        opt.step()
    assert opt.state[param]["step"].item() == 1.0


@pytest.mark.parametrize("engine", BACKENDS)
def test_a_step_holds_no_gradient_when_it_is_over(engine, monkeypatch):
    param, opt = with_schedule(lambda param: None, engine, 100)

    def dropped():
        ref = weakref.ref(param.grad.untyped_storage())
        param.grad = None
        return ref() is None

    opt.step()
    assert dropped()
    param.grad = torch.ones(100)
    opt.check_gradients()
    assert dropped()

    def fail():
        raise KeyError("between")

    param.grad = torch.ones(100)
    Between(monkeypatch, fail)
    with pytest.raises(KeyError):
        opt.step()
    assert dropped()


@pytest.mark.parametrize("engine", BACKENDS)
def test_a_skipped_step_holds_no_gradient(engine):
    param, opt = with_schedule(lambda param: None, engine, 100)
    opt.found_inf = torch.ones(())
    ref = weakref.ref(param.grad.untyped_storage())
    opt.step()
    param.grad = None
    assert ref() is None


def test_what_a_step_uses_cannot_be_resized_meanwhile():
    slots = with_schedule(lambda param: None)[1]._stepper.plans  # plans show their slots on devices
    assert slots
    param, opt = with_schedule(lambda param: None, "triton")
    (plan,) = opt._stepper.plans
    opt._prepared(Begun())
    with plan.skipping.hold():
        with pytest.raises(RuntimeError, match="not resizable"):
            param.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="under way"):
            opt._prepared(Begun())
    param.untyped_storage().resize_(4 * param.numel())
    opt.step()


def test_threads_that_drop_gradients_change_no_step():
    """Without the GIL held, memory is freed and filled while kernels read it.

    The thread lets go of a gradient after ``.grad`` does: torch releases the GIL while it destroys
    one, and until that is done ``.grad`` names what is being destroyed, to every reader.
    """
    size, steps = 200_000, 30
    param = nn.Parameter(torch.zeros(size))
    opt = FusedScaledSGD([param], lr=1.0, backend="native")
    done = threading.Event()

    def drop():
        while not done.is_set():
            dropped, param.grad = param.grad, None
            del dropped
            torch.full((size,), float("nan"))

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        for _ in range(steps):
            param.grad = torch.ones(size)
            opt.step()
    finally:
        done.set()
        thread.join()
    # every step took its gradient or found none
    assert param.unique().numel() == 1
    assert -steps <= param[0].item() <= 0.0
    assert param[0].item() == -opt.state[param]["step"].item()

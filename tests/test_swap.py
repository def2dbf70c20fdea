"""A read changes nothing: weights after ema_weights(), whatever happens inside and around it."""

from __future__ import annotations

import gc
import pickle
import signal
import sys
import threading
import weakref
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from fused_ema import FusedEMA, FusedScaledAdamW, FusedScaledSGD


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.frozen(self.norm(self.first(x))))


def trained(known: bool = True, dtype: torch.dtype = torch.float32, **kwargs):
    torch.manual_seed(0)
    model = Net().to(dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    kwargs = {"ema_decay": 0.5, "model": model if known else None, **kwargs}
    opt = FusedScaledSGD(params, lr=0.5, momentum=0.9, **kwargs)
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(8, 3, dtype=dtype)).square().sum().backward()
        opt.step()
    with torch.no_grad():
        model.first.weight[0, 0] = 1e5  # more than float16 holds
    return model, opt


class Whole:
    """All that a read must leave as it is, bit for bit."""

    def __init__(self, model: nn.Module, opt: torch.optim.Optimizer) -> None:
        self.model, self.opt = model, opt
        self.before = self.now()

    def now(self) -> dict[str, tuple]:
        held = {f"model {k}": v for k, v in self.model.state_dict(keep_vars=True).items()}
        for i, state in enumerate(self.opt.state.values()):
            held |= {f"{i} {k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}
        held |= {
            f"grad {n}": p.grad for n, p in self.model.named_parameters() if p.grad is not None
        }
        return {
            name: (id(t), t.data_ptr(), t.dtype, t.stride(), t.detach().clone(), t._version)
            for name, t in held.items()
        }

    def check(self, versions: bool = True) -> None:
        now = self.now()
        assert now.keys() == self.before.keys()
        for name, (*place, value, version) in self.before.items():
            *place_now, value_now, version_now = now[name]
            assert place_now == place, name
            assert torch.equal(value_now, value), name
            assert not versions or version_now == version or name.startswith("grad"), name


def assert_holds_average(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    for p, state in opt.state.items():
        assert torch.equal(p, state["ema"].to(p.dtype))


def cast_and_back(model):
    model.half()
    model.float()


def cast(model):
    model.half()


def move(model):
    model.to("meta")


def write(model):
    for p in model.parameters():
        if p.requires_grad:
            p.data.fill_(7.0)
    with torch.no_grad():
        model.first.weight.mul_(2.0)


def train(model):
    model(torch.randn(8, 3))


def replace_buffers(model):
    model.seen = model.seen + 1.0
    model.norm.running_mean = torch.ones(7)
    del model.norm.num_batches_tracked


def replace_parameters(model):
    model.first.weight = nn.Parameter(torch.zeros(4, 3))
    model.last.bias = None


def resize(model):
    model.first.weight.data = torch.zeros(2)


def swap_tensors(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.half()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def overwrite(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.half()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize(
    "happens",
    [
        cast_and_back,
        cast,
        move,
        write,
        train,
        replace_buffers,
        replace_parameters,
        resize,
        swap_tensors,
        overwrite,
    ],
)
@pytest.mark.parametrize("raises", [False, True])
def test_all_is_what_it_was_whatever_happens_inside(happens, raises):
    model, opt = trained()
    whole = Whole(model, opt)
    try:
        with opt.ema_weights():
            assert_holds_average(model, opt)
            happens(model)
            if raises:
                raise KeyError
    except KeyError:
        assert raises
    whole.check()
    opt.step()


def test_a_module_that_only_the_context_knows_is_kept():
    model, opt = trained(known=False)
    whole = Whole(model, opt)
    with opt.ema_weights(model=model):
        assert_holds_average(model, opt)
        train(model)
        model.half()
    whole.check()
    with (
        pytest.raises(ValueError, match="model holds none"),
        opt.ema_weights(model=nn.Linear(2, 2)),
    ):
        pass
    with pytest.raises(ValueError, match="model: received a dict"):
        opt.ema_weights(model={})
    whole.check()


@pytest.mark.parametrize("kwargs", [{"master_weights": True}, {"ema_format": "delta"}, {}])
def test_compact_and_master_averages(kwargs):
    model, opt = trained(dtype=torch.bfloat16, **kwargs)
    whole = Whole(model, opt)
    expected = {p: a.bfloat16() for p, a in opt._averages(0).items()}
    with opt.ema_weights():
        assert all(torch.equal(p, a) for p, a in expected.items())
        model.float()
    whole.check()


def test_averaged_buffers_are_held_and_left_as_they_were():
    model, opt = trained(ema_buffers="average")
    held = opt.ema_state_dict(model)["norm.running_mean"]
    before, mine = held.clone(), model.norm.running_mean.clone()
    whole = Whole(model, opt)
    with opt.ema_weights():
        assert torch.equal(model.norm.running_mean, before)
        assert not torch.equal(model.norm.running_mean, mine)
        train(model)
        model.half()
    whole.check()
    assert torch.equal(opt.ema_state_dict(model)["norm.running_mean"], before)


def test_parameters_and_buffers_without_plain_memory():
    base = torch.arange(12.0)
    model = nn.Module()
    model.left = nn.Parameter(base[:6].view(2, 3).t())
    model.right = nn.Parameter(base[3:9])  # shares memory with it
    model.register_buffer("wide", torch.ones(1, 3).expand(4, 3))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("flag", torch.tensor(True))
    opt = FusedScaledSGD([model.left], lr=1.0, ema_decay=0.5, model=model)
    model.left.grad = torch.ones(3, 2)
    opt.step()
    before = base.clone()
    with opt.ema_weights():
        assert not torch.equal(base, before)
        base[:9] = 0.0
        model.wide[0].data.fill_(3.0)
        model.sparse = torch.zeros(3, 3).to_sparse()
        model.flag.logical_not_()
    assert torch.equal(base, before)
    assert torch.equal(model.wide, torch.ones(4, 3))
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))
    assert model.flag.item()


def test_buffers_may_grow_inside_and_only_caches_stay_so():
    model, opt = trained()
    with opt.ema_weights():
        model.cache = torch.ones(5)
        model.seen.resize_(50).fill_(1.0)
    assert torch.equal(model.cache, torch.ones(5))
    assert torch.equal(model.seen, torch.zeros(2))


@pytest.mark.parametrize("size", [0, 4 * 8])
def test_values_come_back_into_new_memory_where_theirs_was_freed(size):
    model, opt = trained()
    weight, frozen = model.last.weight.detach().clone(), model.frozen.weight.detach().clone()
    with opt.ema_weights():
        model.last.weight.untyped_storage().resize_(0)
        model.last.weight.untyped_storage().resize_(size)
    assert torch.equal(model.last.weight, weight)
    context = opt.ema_weights()
    context.__enter__()
    model.frozen.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"frozen\.weight: its storage was resized"):
        context.__exit__(None, None, None)
    assert torch.equal(model.last.weight, weight)
    assert frozen.shape == model.frozen.weight.shape


def test_a_write_that_cannot_be_undone_is_told():
    model, opt = trained()
    whole = Whole(model, opt)
    context = opt.ema_weights()
    context.__enter__()
    model.frozen.bias.add_(1.0)
    model.half()
    with pytest.raises(RuntimeError, match=r"could not restore frozen\.bias: it was written"):
        context.__exit__(None, None, None)
    model.frozen.bias.data.copy_(whole.before["model frozen.bias"][4])
    whole.check(versions=False)
    opt.state_dict()


def test_new_gradients_of_the_users_stay():
    model, opt = trained()
    weight = model.first.weight
    with opt.ema_weights():
        opt.zero_grad()
        model(torch.randn(8, 3)).sum().backward()
        grad = weight.grad
    assert weight.grad is grad
    with opt.ema_weights():
        opt.zero_grad()
    assert weight.grad is None


def test_hooks_of_accumulated_gradients_outlive_a_cast():
    model, opt = trained()
    calls = []
    node = model.first.weight.expand_as(model.first.weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: calls.append(1))
    with opt.ema_weights():
        model.half()
    model(torch.randn(8, 3)).sum().backward()
    assert calls == [1]


def test_backward_passes_do_not_mix_weights_and_averages():
    model, opt = trained()
    weight = model.last.weight
    x = torch.randn(2, 4, requires_grad=True)
    expected = weight.detach().sum(0).expand(2, 4)
    outside = model.last(x).sum()
    with opt.ema_weights():
        inside = model.last(x).sum()
        model.last(x).sum().backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outside.backward(retain_graph=True)
    x.grad = None
    outside.backward()
    assert torch.equal(x.grad, expected)
    for _ in range(20):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            inside.backward(retain_graph=True)
        opt.step()
    with opt.ema_weights(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()


class Interrupt(Exception):
    pass


def in_finalizer(frame) -> bool:
    """Python drops what is raised there."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def interrupted(action, nth: int, frames=None) -> bool:
    """Run it and raise at the nth event of a bytecode, a line or a call; False: there are fewer.

    ``frames``: the codes whose events count, None: all.
    """
    left = [nth]

    def trace(frame, event, arg):
        if (frames is not None and frame.f_code not in frames) or in_finalizer(frame):
            return None
        frame.f_trace_opcodes = True
        left[0] -= 1
        if left[0] == 0:
            raise Interrupt
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Interrupt:
        return True
    finally:
        sys.settrace(old)
    return False


def test_an_exception_at_any_bytecode_leaves_all_whole():
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    opt = FusedScaledSGD(model.parameters(), lr=0.1, ema_decay=0.5, model=model)
    model(torch.randn(8, 4)).sum().backward()
    opt.step()
    whole = Whole(model, opt)

    def read():
        with opt.ema_weights():
            opt.defaults.get("lr")

    read()  # what it imports is not to be traced
    for frames, stride, least in (({read.__code__}, 1, 15), (None, 29, 300)):
        count = 1
        while interrupted(read, count, frames):
            whole.check()
            opt._check_not_swapped("the test")
            count += stride
        assert count > least
    read()
    whole.check()


# Python drops what a handler raises inside a finalizer, such as the stand-in's.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_handlers_that_raise_leave_all_whole():
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(8)])
    opt = FusedScaledSGD(model.parameters(), lr=0.1, ema_decay=0.5, model=model)
    model(torch.randn(8, 128)).sum().backward()
    opt.step()
    whole = Whole(model, opt)

    def raising(*_):
        raise Interrupt

    old = signal.signal(signal.SIGALRM, raising)
    hits = 0
    try:
        for i in range(150):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + i * 1e-5)
                with opt.ema_weights():
                    pass
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                hits += 1
            whole.check()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert hits > 10


def test_an_error_on_entry_changes_nothing():
    model, opt = trained()
    whole = Whole(model, opt)
    average = opt.state[model.last.weight]["ema"]
    opt.state[model.last.weight]["ema"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="state 'ema' has shape"), opt.ema_weights():
        pass
    opt.state[model.last.weight]["ema"] = torch.zeros(2, 4, device="meta")  # cannot be copied
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"), opt.ema_weights():
        pass
    opt.state[model.last.weight]["ema"] = average
    whole.check()
    opt.state_dict()


def test_other_threads_are_refused_inside():
    model, opt = trained()
    errors = []

    def attempt():
        for misuse in (
            opt.step,
            opt.check_gradients,
            opt.state_dict,
            lambda: opt.load_state_dict({}),
            lambda: pickle.dumps(opt),
            lambda: opt.copy_ema_to(model),
            lambda: opt.ema_state_dict(model),
            lambda: opt.ema_weights().__enter__(),
        ):
            with pytest.raises(RuntimeError, match=r"inside ema_weights\(\)"):
                misuse()
            errors.append(misuse)

    with opt.ema_weights():
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(errors) == 8


class Wrapper:
    """Takes the optimizer's class and forwards what it lacks, as trainers' wrappers do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._wrapped = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def __getattr__(self, name: str):
        return getattr(self._wrapped, name)


class Sharing:
    """Takes the optimizer's attributes over."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__ = dict(optimizer.__dict__)
        self.__class__ = type("Shared", (type(optimizer),), {})


@pytest.mark.parametrize("wrapper", [Wrapper, Sharing])
def test_a_wrapper_and_what_it_wraps_know_of_each_others_swap(wrapper):
    model, opt = trained()
    wrapped = wrapper(opt)
    whole = Whole(model, opt)
    for one, other in ((opt, wrapped), (wrapped, opt)):
        with one.ema_weights():
            assert_holds_average(model, opt)
            for misuse in (other.state_dict, other.step, other.ema_weights().__enter__):
                with pytest.raises(RuntimeError, match=r"inside ema_weights\(\)"):
                    misuse()
        whole.check()
        other.state_dict()


def test_two_averages_of_one_tensor_do_not_nest():
    model = nn.Linear(2, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (FusedEMA(inner, decay, model=model) for decay in (0.5, 0.9))
    model(torch.ones(1, 2)).sum().backward()
    inner.step()
    whole = Whole(model, first)
    with first.ema_weights():
        with pytest.raises(RuntimeError, match="another optimizer's average"), second.ema_weights():
            pass
        assert_holds_average(model, first)
    whole.check()
    with second.ema_weights():
        assert_holds_average(model, second)
    whole.check()


def test_a_context_is_entered_once():
    model, opt = trained()
    whole = Whole(model, opt)
    context = opt.ema_weights()
    with pytest.raises(RuntimeError, match="not open"):
        context.__exit__(None, None, None)
    with context, pytest.raises(RuntimeError, match="entered before"):
        context.__enter__()
    with pytest.raises(RuntimeError, match="entered before"):
        context.__enter__()
    with pytest.raises(RuntimeError, match="not open"):
        context.__exit__(None, None, None)
    whole.check()


def test_a_decorator_enters_at_each_call():
    model, opt = trained()
    whole = Whole(model, opt)

    @opt.ema_weights()
    def evaluate():
        assert_holds_average(model, opt)
        return model.last.weight.clone()

    assert torch.equal(evaluate(), evaluate())
    whole.check()


def test_an_exit_stack_and_an_abandoned_context():
    model, opt = trained()
    whole = Whole(model, opt)
    with ExitStack() as stack:
        stack.enter_context(opt.ema_weights())
        assert_holds_average(model, opt)
    whole.check()
    context = opt.ema_weights()
    context.__enter__()
    assert_holds_average(model, opt)
    del context
    whole.check()
    opt.step()

    def generate():
        with opt.ema_weights():
            yield

    whole = Whole(model, opt)
    running = generate()
    next(running)
    del running
    whole.check()


def test_a_context_in_a_cycle_is_collected():
    model, opt = trained()
    whole = Whole(model, opt)
    holder = nn.Module()
    holder.context = opt.ema_weights()
    holder.context.__enter__()
    holder.cycle = [holder]
    alive = weakref.ref(holder)
    del holder
    gc.collect()
    assert alive() is None
    whole.check()
    opt.state_dict()
    holder = nn.Module()
    opt.holder = holder  # the cycle runs through what the context holds
    holder.context = opt.ema_weights()
    alive = weakref.ref(holder)
    del holder, opt, whole
    gc.collect()
    assert alive() is None


def test_what_cannot_be_resharded_is_told_when_all_is_back(monkeypatch):
    model, opt = trained()
    whole = Whole(model, opt)
    calls = []

    def reshard(modules):
        calls.append(modules)
        if len(calls) > 1:
            raise Interrupt

    monkeypatch.setattr("fused_ema.ema.access.reshard", reshard)
    with pytest.raises(Interrupt), opt.ema_weights():
        pass
    assert len(calls) == 3  # on entry, on exit, and once more
    whole.check()
    opt.state_dict()


def test_dispatch_modes_and_inference_mode_see_nothing():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    model, opt = trained()
    whole = Whole(model, opt)
    context = opt.ema_weights()
    with torch.inference_mode(), context:
        assert_holds_average(model, opt)
        model.half()
    whole.check()
    with Counting() as mode:
        context = opt.ema_weights()
        context.__enter__()
        before = mode.calls
        context.__exit__(None, None, None)
        assert mode.calls == before
    whole.check()


def test_reading_before_the_first_step_begins_nothing():
    for kwargs in ({}, {"ema_format": "delta"}, {"ema_decay": (0.5, 0.9)}):
        model = Net().bfloat16()
        opt = FusedScaledAdamW(
            model.parameters(), **{"ema_decay": 0.5, **kwargs}, model=model, master_weights=True
        )
        whole = Whole(model, opt)
        with opt.ema_weights():
            assert torch.equal(model.last.bias, whole.before["model last.bias"][4])
        assert torch.equal(opt.ema_state_dict(model)["last.bias"], model.last.bias)
        other = Net()
        opt.copy_ema_to(other)
        assert torch.equal(other.last.bias, model.last.bias.float())
        opt.copy_ema_to(model)
        saved = opt.state_dict()["state"]
        assert not saved
        assert len(opt.state) == 0
        whole.check(versions=False)


@pytest.mark.parametrize("form", ["full", "bf16"])
def test_reading_a_teacher_before_the_first_step_sees_the_teacher(form):
    model, teacher = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
    teacher.to(torch.bfloat16 if form == "bf16" else torch.float32)
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.5, teacher=teacher, ema_format=form)
    with opt.ema_weights():
        assert torch.equal(model.weight, teacher.weight.float())
        model.half()
    assert torch.equal(opt.ema_state_dict(model)["weight"], teacher.weight.float())
    assert len(opt.state) == 0


def test_weights_loaded_after_an_evaluation_are_where_training_starts():
    model = nn.Linear(3, 3, bias=False).bfloat16()
    opt = FusedScaledSGD(model.parameters(), lr=0.5, ema_decay=0.75, master_weights=True)
    with opt.ema_weights():
        model(torch.ones(1, 3).bfloat16())
    with torch.no_grad():
        model.weight.fill_(7.0)
    model.weight.grad = torch.ones(3, 3).bfloat16()
    opt.step()
    assert torch.equal(opt.state[model.weight]["master"], torch.full((3, 3), 6.5))
    assert torch.equal(opt.state[model.weight]["ema"], torch.full((3, 3), 7 * 0.75 + 6.5 * 0.25))


def test_masters_take_an_average_that_is_copied_into_their_weights():
    model, opt = trained(dtype=torch.bfloat16, master_weights=True)
    weight = model.last.weight
    average = opt.state[weight]["ema"].clone()
    opt.copy_ema_to(model)
    assert torch.equal(weight, average.bfloat16())
    assert torch.equal(opt.state[weight]["master"], average)
    opt.state[weight]["momentum_buffer"].zero_()
    weight.grad = torch.ones_like(weight)
    opt.step()
    assert torch.equal(opt.state[weight]["master"], average - 0.5)


def test_differences_stay_averages_when_their_weights_are_replaced():
    model, opt = trained(ema_format="delta", ema_decay=(0.5, 0.75), master_weights=True)
    with torch.no_grad():
        model.first.weight[0, 0] = 1.0  # a difference reaches no further than 64
    before = [{p: a.clone() for p, a in opt._averages(i).items()} for i in range(2)]
    opt.copy_ema_to(model)
    for i in range(2):
        for p, a in opt._averages(i).items():
            # float16 keeps 11 bits of the difference
            away = (before[i][p] - before[0][p]).abs() * 2.0**-11
            assert ((a - before[i][p]).abs() <= away + 1e-6).all()
    assert all(torch.equal(p, a) for p, a in before[0].items())

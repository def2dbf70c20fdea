"""Exceptions, signals and other threads leave weights and averages whole."""

from __future__ import annotations

import pickle
import signal
import sys
import threading

import pytest
import torch
from swaps import Whole, trained
from torch import nn

from fused_ema import FusedScaledSGD


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

"""load_state_dict() takes all of a state, or refuses it and changes nothing."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
import twins
from checkpoints import fresh, network, train, trained, with_buffers
from torch import nn

from fused_ema import FusedScaledAdamW


def _meta(value):
    return value.to("meta")


def _sparse(value):
    return value.to_sparse()


def _state(key: str, make: Callable) -> Callable:
    return lambda saved: saved["state"][1].update({key: make(saved["state"][1][key])})


def _buffer(make: Callable) -> Callable:
    def damage(saved):
        held = saved["state"][0]["ema_buffers"]["0"]
        held["1.running_var"] = make(held["1.running_var"])

    return damage


def _group(**fields) -> Callable:
    return lambda saved: saved["param_groups"][0].update(fields)


NAN = float("nan")


KINDS = (_meta, _sparse, twins.quantized)


STEPS = (NAN, -1, float("inf"), "x", torch.ones(2))


COUNTS = {
    "base_steps": (NAN, -5.0, float("inf"), "x", None),
    "ema_waited": (NAN, -1.0, "x"),
    "ema_skips": (-3, 1.5, "x"),
    "ema_every": (0, 1.5),
    "max_grad_norm": (-1.0,),
    "ema_format": (True, "bf17"),
}


DAMAGES = {
    **{f"ema {make.__name__}": _state("ema", make) for make in KINDS},
    **{f"exp_avg {make.__name__}": _state("exp_avg", make) for make in KINDS},
    **{f"buffer {make.__name__}": _buffer(make) for make in KINDS},
    "buffer str": _buffer(str),
    "buffer name": lambda saved: saved["state"][0]["ema_buffers"]["0"].update(x=torch.ones(1)),
    "complex": _state("ema", lambda value: value.to(torch.complex64)),
    "entry": lambda saved: saved["state"].update({1: 3}),
    **{f"step {v}": _state("step", lambda _, v=v: v) for v in STEPS},
    **{f"{name} {v}": _group(**{name: v}) for name, bad in COUNTS.items() for v in bad},
}


@pytest.mark.parametrize("decay", [0.9, lambda t: 0.5], ids=["constant", "schedule"])
@pytest.mark.parametrize("name", DAMAGES)
def test_what_no_step_could_go_on_from_changes_nothing(name, decay):
    model, teacher = network(), network()
    opt = with_buffers(model, ema_decay=decay)
    taught = FusedScaledAdamW(model.parameters(), ema_decay=decay, teacher=teacher, model=model)
    train(model, opt, 1)
    train(model, taught, 1)
    for victim in (opt, taught):
        before = snapshot(victim, teacher)
        bad = copy.deepcopy(victim.state_dict())
        DAMAGES[name](bad)
        with pytest.raises(ValueError, match=r"allowed"):
            victim.load_state_dict(bad)
        assert snapshot(victim, teacher) == before


def snapshot(opt, teacher: nn.Module) -> str:
    """All that a load may change, to be compared."""
    return str((opt.state_dict(), teacher.state_dict()))


def interrupted_at(line: int, call: Callable[[], None]) -> bool:
    """Call, and press Ctrl-C at the n-th line of the package; whether it came so far."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        if "fused_ema" not in frame.f_code.co_filename:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    enabled = torch.is_grad_enabled()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
        torch.set_grad_enabled(enabled)  # Python can leave a with statement without its exit
    return False


@pytest.mark.parametrize("kind", ["average", "teacher"])
def test_an_interrupt_leaves_the_old_or_the_new_state(kind):
    def make():
        model, teacher = network(), network()
        if kind == "average":
            return model, teacher, with_buffers(model)
        return (
            model,
            teacher,
            FusedScaledAdamW(model.parameters(), ema_decay=0.9, teacher=teacher, model=model),
        )

    model, teacher, opt = make()
    train(model, opt, 3, seed=5)
    saved = copy.deepcopy(opt.state_dict())
    new = snapshot(opt, teacher)
    seen = set()
    victim_model, victim_teacher, victim = make()
    train(victim_model, victim, 1)
    old_state = copy.deepcopy(victim.state_dict())
    old = snapshot(victim, victim_teacher)
    line = 1
    while interrupted_at(line, lambda: victim.load_state_dict(saved)):
        found = snapshot(victim, victim_teacher)
        assert found in (old, new), line
        seen.add(found)
        if found == new:
            victim.load_state_dict(old_state)
            assert snapshot(victim, victim_teacher) == old
        line += 1 if line > 40 else 7
    assert seen == {old, new}
    assert snapshot(victim, victim_teacher) == new


def test_warnings_as_errors_change_nothing():
    params, opt = trained(kappa=2.0)
    _, other = fresh(params, kappa=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="kappa"):
            other.load_state_dict(opt.state_dict())
    assert other.kappa == 3.0
    assert not other.state

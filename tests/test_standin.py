"""What stands in for the extension gives the same answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ema import _native
from fused_ema.extension import standin


class Plain(torch.Tensor):
    """A subclass with operators of its own."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).view(4, 6)
    with torch.inference_mode():
        inference = torch.zeros(3)
    return {
        "plain": base,
        "parameter": torch.nn.Parameter(torch.zeros(3)),
        "part": base[1:3],
        "with gaps": base[:, 2:4],
        "transposed": base.t(),
        "expanded": torch.zeros(1).expand(5),
        "scalar": torch.zeros(()),
        "empty": torch.zeros(0, 3),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "conjugate": torch.zeros(2, dtype=torch.complex64).conj(),
        "negative": torch.zeros(2, dtype=torch.complex64).conj().imag,
        "zeros without memory": torch._efficientzerotensor(3),
        "sparse": torch.zeros(3, 3).to_sparse(),
        "meta": torch.zeros(3, device="meta"),
        "inference": inference,
        "copied when written": torch._lazy_clone(base),
        "subclass": torch.zeros(3).as_subclass(Plain),
        "part of a subclass": torch.zeros(4)[1:3].as_subclass(Plain),
        "subclass copied when written": torch._lazy_clone(base).as_subclass(Plain),
        "resized": resized(),
    }


def resized() -> torch.Tensor:
    tensor = torch.zeros(3)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("name", list(tensors()))
def test_tensors_are_seen_alike(name):
    made = tensors()
    tensor = made[name]
    assert standin.is_plain(tensor) == _native.is_plain(tensor)
    assert standin.spans([tensor]) == _native.spans([tensor])
    assert torch._C._is_cow_tensor(made["copied when written"])  # looking at it is no write
    for addresses in (standin.Addresses, _native.Addresses):
        first = addresses([tensor])
        assert first.unchanged([tensor])
        assert not first.unchanged([tensor, tensor])
        assert not first.unchanged([torch.zeros(9)[1:]])


def test_a_mode_does_not_see_them_looked_at():
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    plain = torch.zeros(3)
    with Seeing():
        assert standin.is_plain(plain)
        standin.spans([plain])
        assert standin.Addresses([plain]).unchanged([plain])
    assert not seen


CHANGES = {
    "nothing": (lambda groups, state: None, True),
    "a parameter more": (lambda groups, state: groups[0]["params"].append(torch.zeros(1)), False),
    "another list": (lambda groups, state: groups[0].update(params=[*groups[0]["params"]]), False),
    "a group more": (lambda groups, state: groups.append({"params": []}), False),
    "another value": (lambda groups, state: first(state).update(step=torch.zeros(1)), False),
    "a value more": (lambda groups, state: first(state).update(more=1), False),
    "a value less": (lambda groups, state: first(state).pop("step"), False),
    "taken out and put back": (
        lambda groups, state: first(state).update(ema=first(state).pop("ema")),
        True,
    ),
    "another order": (
        lambda groups, state: first(state).update(step=first(state).pop("step")),
        False,
    ),
    "another entry": (lambda groups, state: state.update({next(iter(state)): {}}), False),
    "an entry more": (lambda groups, state: state.update({torch.zeros(1): {}}), False),
    "a hyper-parameter": (lambda groups, state: groups[0].update(lr=2.0), True),
}


def first(state):
    return next(iter(state.values()))


@pytest.mark.parametrize("watch", [standin.Watch, _native.Watch], ids=["stand-in", "extension"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen_alike(change, watch):
    params = [torch.zeros(2), torch.zeros(3)]
    groups = [{"params": params, "lr": 1.0}]
    state = {p: {"step": torch.zeros(()), "ema": torch.zeros_like(p)} for p in params}
    watched = watch(groups, state)
    assert watched.unchanged(groups, state)
    make, same = CHANGES[change]
    make(groups, state)
    assert watched.unchanged(groups, state) == same


def test_the_tests_of_the_core_pass_on_it():
    """Without the extension, in a process of its own, but for what only C can do."""
    tests = Path(__file__).parent
    left_out = "not hooks_of_accumulated_gradients and not False"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", left_out]
    done = subprocess.run(
        [*command, "--backends=foreach", str(tests / "test_swap.py")],
        env={**os.environ, "FUSED_EMA_NO_EXTENSION": "1"},
        cwd=tests.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout

"""KeyboardInterrupt at a random line: what was interrupted is done, or has not begun."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from .loads import Training
from .snapshots import difference

Call = Callable[[Training], Any]


class Lines:
    """Counts lines of Python below a call, and raises KeyboardInterrupt at one of them."""

    def __init__(self, last: int | None = None) -> None:
        self.count, self.last, self.where = 0, last, ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.last:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    def during(self, call: Callable[[], Any]) -> None:
        before, enabled = sys.gettrace(), torch.is_grad_enabled()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            pass  # with it goes what its frames held
        finally:
            sys.settrace(before)
            # Python can leave a with statement without its exit
            torch.set_grad_enabled(enabled)


def make(seed: int) -> Training:
    """A training whose steps are native: a loop of torch's calls can only be left half-way."""
    return Training(seed, backend="native")


def interrupted(seed: int, call: Call) -> tuple[Training, str]:
    """A training of the seed in which the call was interrupted, and where."""
    counting = Lines()
    whole = make(seed)
    counting.during(lambda: call(whole))
    lines = Lines(random.Random(seed).randint(1, counting.count))
    training = make(seed)
    lines.during(lambda: call(training))
    return training, lines.where


def done_or_not(seed: int, call: Call) -> None:
    """After an interrupt the optimizer is as before the call or after it, also to the next step."""
    training, where = interrupted(seed, call)
    taken, untaken = make(seed), make(seed)
    call(taken)
    found = training.snapshot()
    told = [difference(found, twin.snapshot()) for twin in (taken, untaken)]
    assert "" in told, f"interrupted at {where}: not done: {told[0]}; not undone: {told[1]}"
    twin = (taken, untaken)[told.index("")]
    for one in (training, twin):
        one.advance(2, seed + 1)
    told_later = difference(training.snapshot(), twin.snapshot())
    assert not told_later, f"interrupted at {where}, the next steps differ: {told_later}"


def step_is_whole(seed: int) -> None:
    def call(training: Training) -> None:
        training.opt.step()

    done_or_not(seed, call)


def load_is_whole(seed: int) -> None:
    other = make(seed)
    other.advance(2, seed + 1)
    state = other.opt.state_dict()

    def call(training: Training) -> None:
        training.opt.load_state_dict(copy.deepcopy(state))

    done_or_not(seed, call)


def unchanged(seed: int, call: Call) -> None:
    training, where = interrupted(seed, call)
    untouched = make(seed)
    for steps in (0, 2):
        for one in (training, untouched):
            one.advance(steps, seed + 1)
        told = difference(training.snapshot(), untouched.snapshot())
        assert not told, f"interrupted at {where}, {steps} steps later: {told}"


def state_dict_changes_nothing(seed: int) -> None:
    def call(training: Training) -> None:
        training.opt.state_dict()

    unchanged(seed, call)


def swap_changes_nothing(seed: int) -> None:
    if make(seed).opt.param_groups[0]["ema_decay"] is None:
        return  # nothing to swap

    def call(training: Training) -> None:
        with training.opt.ema_weights():
            pass

    unchanged(seed, call)
